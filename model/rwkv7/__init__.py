"""RWKV-7 ("x070", "Goose"; Peng et al. 2025, arXiv 2503.14456)."""

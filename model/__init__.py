"""The paper's language model in plain PyTorch.  Imports nothing of `server/`."""

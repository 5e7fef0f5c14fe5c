"""RWKV-7 compiled for CPUs."""

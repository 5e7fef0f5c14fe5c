"""Kernels shared by all families."""

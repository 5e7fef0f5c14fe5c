"""Prefill and decode on a GPU, with Triton kernels.

Tests run the same code on a CPU with Triton's interpreter.
"""

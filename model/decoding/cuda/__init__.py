"""Decoding on a GPU.

Tests run the same code on a CPU with Triton's interpreter.
"""

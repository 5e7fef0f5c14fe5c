"""Steps on a GPU.

Without one all of it also runs on a CPU, in Triton's interpreter, which tests do.
"""

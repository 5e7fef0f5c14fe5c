"""A network's `prefill` and `step` on a GPU, from the kernels of `model.kernels`.

Without a GPU all of it also runs on a CPU, in Triton's interpreter, which tests do.
"""

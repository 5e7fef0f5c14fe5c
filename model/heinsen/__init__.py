"""The network of "Softmax Attention with Constant Cost per Token"."""

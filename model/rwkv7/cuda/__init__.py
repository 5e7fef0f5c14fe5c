"""RWKV-7's recurrence for GPUs."""

"""Memory on large pages."""

import torch

from model.memory import ALIGNMENT, BLOCK_BYTES, LargePages


def test_tensors_of_a_block_are_zero_aligned_and_do_not_overlap() -> None:
    pages = LargePages()
    shapes = [(3, 5), (BLOCK_BYTES // 4 - 7,), (1,), (0, 4), (2, BLOCK_BYTES // 4), (7,)]
    tensors = [pages.zeros(shape, torch.float32) for shape in shapes]
    for shape, tensor in zip(shapes, tensors, strict=True):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert not tensor.any()
    for number, tensor in enumerate(tensors, 1):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors, 1):
        assert (tensor == number).all()


def test_a_tensor_outlives_what_it_came_from() -> None:
    kept = LargePages().zeros((1000,), torch.int8)
    kept.fill_(3)
    for _ in range(3):
        LargePages().zeros((BLOCK_BYTES,), torch.int8).fill_(1)
    assert (kept == 3).all()

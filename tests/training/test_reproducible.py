"""Bitwise gradients are summed in the order of one binary tree."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distrib.strategies.bitwise_ddp import Bucket


def tree(leaves: list[Tensor]) -> Tensor:
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return tree(leaves[:half]) + tree(leaves[half:])


@given(level=st.integers(0, 6), seed=st.integers(0, 1000), extra=st.integers(0, 3))
def test_a_bucket_adds_in_the_order_of_the_tree(level: int, seed: int, extra: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(5))]
    bucket = Bucket(parameters, world_size=4, extra=extra)
    assert len(bucket.flat) % 4 == 0
    size = 11 + extra
    leaves = [torch.randn(size, generator=generator) * 10 ** (seed % 7) for _ in range(2**level)]
    for _ in range(2):  # nothing of the first window is left in the second
        for number, leaf in enumerate(leaves):
            bucket.flat.zero_()
            for parameter, gradient in zip(parameters, (leaf[:6].view(3, 2), leaf[6:11]), strict=True):
                assert parameter.grad is not None
                parameter.grad += gradient
            bucket.extra.copy_(leaf[11:])
            if number < len(leaves) - 1:
                bucket.count()
        bucket.close()
        assert torch.equal(bucket.flat[:size], tree(leaves))
        assert len(bucket.partial) == 0


def test_another_order_rounds_differently() -> None:
    leaves = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert not torch.equal(tree(leaves), torch.stack(leaves).sum(0))

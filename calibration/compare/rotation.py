"""The Walsh-Hadamard transform with random signs, which spreads outliers over all dimensions before rounding."""

from functools import cache

import torch
from torch import Tensor

# vLLM's, in vllm/v1/attention/ops/int4_per_token_head.py.
SEED = 0x9E3779B9


def hadamard(x: Tensor) -> Tensor:
    """x H for the symmetric +-1 matrix H of Sylvester's construction, H H = b I.

    b is the largest power of two that divides the last dimension; blocks of b are transformed one by one.
    """
    size = block(x.shape[-1])
    return (x.unflatten(-1, (-1, size)) @ _sylvester(size).to(x)).flatten(-2)


def rotate(x: Tensor) -> Tensor:
    """Random signs, then `hadamard`: sqrt(b) times an orthogonal map."""
    return hadamard(x * _signs(x.shape[-1]).to(x))


def unrotate(x: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    return hadamard(x) * _signs(x.shape[-1]).to(x) / block(x.shape[-1])


def block(dim: int) -> int:
    """The largest power of two that divides `dim`."""
    return dim & -dim


@cache
def _sylvester(size: int) -> Tensor:
    if size == 1:
        return torch.ones(1, 1)
    half = _sylvester(size // 2)
    return torch.cat((torch.cat((half, half), 1), torch.cat((half, -half), 1)))


@cache
def _signs(dim: int) -> Tensor:
    """+-1 [dim], the same in every block."""
    size = block(dim)
    drawn = torch.bernoulli(torch.full((size,), 0.5), generator=torch.Generator().manual_seed(SEED))
    return (2 * drawn - 1).repeat(dim // size)

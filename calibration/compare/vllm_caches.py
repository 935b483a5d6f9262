"""Caches of vLLM 0.32, emulated from its sources: int8, fp8 and int4 per token and head, and TurboQuant.

vLLM rounds keys and values to the model's dtype first; here they stay float32.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from calibration.compare.rotation import block, hadamard, rotate, unrotate
from calibration.compare.stores import Field, Store

# Lower limits of scales and norms in vLLM's kernels.
LEAST_SCALE, LEAST_UNIFORM_SCALE, NORM_FLOOR = 1e-6, 1e-8, 1e-8


@dataclass(frozen=True)
class Scaled(Store):
    """int8 or fp8 per token and head: a float32 scale that takes the largest magnitude to the dtype's largest number.

    vllm/v1/attention/ops/triton_reshape_and_cache_flash.py, `_reshape_cache_per_token_head`.
    """

    dtype: torch.dtype

    def encode(self, x: Tensor, positions: Tensor) -> tuple[Field, ...]:
        largest = (torch.finfo if self.dtype.is_floating_point else torch.iinfo)(self.dtype).max
        scale = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(LEAST_SCALE)
        scaled = x * (1 / scale)
        if not self.dtype.is_floating_point:
            scaled = _half_away(scaled)
        return Field.whole(scaled.clamp(-largest, largest).to(self.dtype)), Field.whole(scale)

    def decode(self, fields: tuple[Field, ...], positions: Tensor) -> Tensor:
        return fields[0].values.float() * fields[1].values


@dataclass(frozen=True)
class Int4(Store):
    """int4 per token and head: rotated, min-max, its zero a whole number in the low bits of a float32 scale.

    vllm/v1/attention/ops/int4_per_token_head.py, `_reshape_cache_int4_kernel` and `_attn_packed`.
    """

    def encode(self, x: Tensor, positions: Tensor) -> tuple[Field, ...]:
        turned = rotate(x)
        least, largest = turned.aminmax(dim=-1, keepdim=True)
        scale = ((largest - least) / 15).clamp_min(LEAST_SCALE)
        zero = _half_away(-least / scale).clamp(0, 15)
        codes = _half_away(turned * (1 / scale) + zero).clamp(0, 15)
        hidden = (scale.view(torch.int32) & -16) | zero.int()
        return Field(codes.to(torch.uint8), 4), Field.whole(hidden)

    def decode(self, fields: tuple[Field, ...], positions: Tensor) -> Tensor:
        codes, hidden = fields[0].values, fields[1].values
        return unrotate((codes - (hidden & 15)) * (hidden & -16).view(torch.float32))


@dataclass(frozen=True)
class LloydMax(Store):
    """TurboQuant's keys: direction rotated and rounded to Gaussian Lloyd-Max levels, norm in float16, norm corrected.

    vllm/v1/attention/ops/triton_turboquant_{store,decode}.py; TurboQuant is arXiv:2504.19874, but vLLM leaves its second
    stage (QJL) out and rotates without random signs. vLLM takes head sizes that are powers of two only.
    """

    bits: int

    def encode(self, x: Tensor, positions: Tensor) -> tuple[Field, ...]:
        norm = x.norm(dim=-1, keepdim=True)
        turned = hadamard(x / (norm + NORM_FLOOR)) / math.sqrt(block(x.shape[-1]))
        levels = gaussian_levels(x.shape[-1], self.bits).to(x)
        codes = torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2, right=True)
        return Field(codes.to(torch.uint8), self.bits), Field.whole(norm.half())

    def decode(self, fields: tuple[Field, ...], positions: Tensor) -> Tensor:
        codes, norm = fields[0].values, fields[1].values.float()
        chosen = gaussian_levels(codes.shape[-1], self.bits).to(norm)[codes.long()]
        corrected = chosen / (chosen.square().sum(-1, keepdim=True) + 1e-16).sqrt()
        return hadamard(norm * corrected) / math.sqrt(block(codes.shape[-1]))


@dataclass(frozen=True)
class Uniform(Store):
    """TurboQuant's values: min-max per token and head; codes from a float32 scale, restored with a float16 one.

    `_store_quantized_value` in vllm/v1/attention/ops/triton_turboquant_store.py.
    """

    bits: int

    def encode(self, x: Tensor, positions: Tensor) -> tuple[Field, ...]:
        top = (1 << self.bits) - 1
        least, largest = x.aminmax(dim=-1, keepdim=True)
        scale = ((largest - least) / top).clamp_min(LEAST_UNIFORM_SCALE)
        codes = ((x - least) / scale + 0.5).floor().clamp(0, top)
        return Field(codes.to(torch.uint8), self.bits), Field.whole(scale.half()), Field.whole(least.half())

    def decode(self, fields: tuple[Field, ...], positions: Tensor) -> Tensor:
        codes, scale, least = (field.values.float() for field in fields)
        return codes * scale + least


@cache
def gaussian_levels(dim: int, bits: int) -> Tensor:
    """Lloyd-Max levels of N(0, 1/dim) as vLLM computes them, float32 [2**bits].

    Means by the trapezoidal rule with 200 steps, outer cells out to 10.5 standard deviations, at most 200 rounds
    (vllm/model_executor/layers/quantization/turboquant/centroids.py).
    """
    reach, count = 3.5 / math.sqrt(dim), 1 << bits
    levels = -reach + 2 * reach * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for _ in range(200):
        edges = torch.cat(
            (levels.new_tensor([-3 * reach]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([3 * reach]))
        )
        x = edges[:-1, None] + torch.linspace(0, 1, 201, dtype=torch.float64) * edges.diff()[:, None]
        density = torch.exp(-x.square() * dim / 2)
        means = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
        moved, levels = (means - levels).abs().max(), means
        if moved < 1e-10:
            break
    return levels.float()


def _half_away(x: Tensor) -> Tensor:
    """Rounded to whole numbers, halves away from zero."""
    return torch.trunc(x + torch.where(x >= 0, 0.5, -0.5))

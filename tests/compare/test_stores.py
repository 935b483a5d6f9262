"""Every store against its second formulation in `tests.compare.packed` or vLLM's own code, and as many bytes."""

import math
import struct
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.compare.integers import ChannelIntegers, TokenIntegers
from calibration.compare.rank import Components, Truncated
from calibration.compare.rotation import hadamard, rotate, unrotate
from calibration.compare.stores import BFLOAT16, FP8, Field, Store
from calibration.compare.vllm_caches import Int4, LloydMax, Scaled, Uniform, gaussian_levels
from tests.compare import packed

HEADS, TOKENS = 2, 7
DIMS = (8, 24, 64)


def vectors(dim: int) -> Tensor:
    """Like keys: a few dimensions far larger than the others and far from zero, and one vector of zeros."""
    random = torch.Generator().manual_seed(dim)
    scale = torch.rand(HEADS, 1, dim, generator=random).exp() ** 3
    shift = 4 * torch.randn(HEADS, 1, dim, generator=random)
    x = scale * torch.randn(HEADS, TOKENS, dim, generator=random) + shift
    x[1, 3] = 0
    return x


def check(store: Store, x: Tensor, expected: np.ndarray, stored_bytes: int) -> None:
    positions = torch.arange(1, x.shape[1] + 1)
    restored = store.restore(x, positions)
    assert restored.dtype == torch.float32
    np.testing.assert_allclose(restored.numpy(), expected, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    assert sum(field.size for field in store.encode(x, positions)) == 8 * stored_bytes
    assert HEADS * store.size(x.shape[1], x.shape[2]) == 8 * stored_bytes


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 8, 32])
def test_token_integers(dim: int, bits: int, group: int) -> None:
    x = vectors(dim)
    cut = x.numpy().reshape(HEADS, -1, math.gcd(group, dim))
    expected, size = packed.each(cut, partial(packed.min_max, bits=bits), partial(packed.from_min_max, bits=bits))
    check(TokenIntegers(bits, group), x, expected.reshape(x.shape), size)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [2, 4])
def test_rotated_token_integers(dim: int, bits: int) -> None:
    x = vectors(dim)
    expected, size = packed.each(
        rotate(x).numpy(), partial(packed.min_max, bits=bits), partial(packed.from_min_max, bits=bits)
    )
    check(TokenIntegers(bits, rotated=True), x, unrotate(torch.tensor(expected).float()).numpy(), size)


@pytest.mark.parametrize("bits", [2, 4])
def test_channel_integers(bits: int) -> None:
    x, group = vectors(64)[:, :5], 3
    # Tokens 1 to 5: the first run lost its first token to the sink.
    expected = np.empty(x.shape)
    for head in range(HEADS):
        for dim in range(64):
            for run in ([0, 1], [2, 3, 4]):
                data = packed.min_max(x[head, run, dim].tolist(), bits)
                expected[head, run, dim] = packed.from_min_max(data, bits)[: len(run)]
    restored = ChannelIntegers(bits, group).restore(x, torch.arange(1, 6))
    np.testing.assert_allclose(restored.numpy(), expected, rtol=1e-4, atol=1e-4)
    # Of 6 tokens in two runs: codes, and two float16 for each of 64 dimensions and run.
    assert ChannelIntegers(bits, group).size(6, 64) == 6 * 64 * bits + 2 * 64 * 2 * 16


def test_bfloat16_is_the_nearest_of_half_the_bytes() -> None:
    x = vectors(24)

    def store(vector: list[float]) -> bytes:
        words = struct.unpack(f"<{len(vector)}I", struct.pack(f"<{len(vector)}f", *vector))
        return struct.pack(f"<{len(vector)}H", *((w + 0x7FFF + (w >> 16 & 1)) >> 16 for w in words))

    def read(data: bytes) -> list[float]:
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        return list(struct.unpack(f"<{len(halves)}f", struct.pack(f"<{len(halves)}I", *(h << 16 for h in halves))))

    expected, size = packed.each(x.numpy(), store, read)
    check(BFLOAT16, x, expected, size)
    assert np.array_equal(BFLOAT16.restore(x, torch.arange(TOKENS)).numpy(), expected)


def test_fp8_is_the_nearest_byte_and_saturates() -> None:
    x = 30 * vectors(24)
    x[0, 0, :3] = torch.tensor([1e6, -500.0, 0.001])

    expected, size = packed.each(
        x.numpy(), lambda v: bytes(map(packed.nearest_float8, v)), lambda data: [packed.float8(b) for b in data]
    )
    assert expected[0, 0, :2].tolist() == [448, -448]
    check(FP8, x, expected, size)
    assert np.array_equal(FP8.restore(x, torch.arange(TOKENS)).numpy(), expected)


def test_scaled_int8_and_fp8() -> None:
    x = vectors(24)
    expected, size = packed.each(x.numpy(), packed.int8_scaled, packed.from_int8_scaled)
    check(Scaled(torch.int8), x, expected, size)
    expected, size = packed.each(x.numpy(), packed.float8_scaled, packed.from_float8_scaled)
    check(Scaled(torch.float8_e4m3fn), x, expected, size)


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_is_that_of_vllm(dim: int) -> None:
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    x = vectors(dim)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5 * float(x.abs().max()))
    close(rotate(x), single_rht(x))
    close(unrotate(rotate(x)), x)
    close(hadamard(x[0, 0]), torch.tensor(packed.hadamard(x[0, 0].tolist())))


@pytest.mark.parametrize("dim", DIMS)
def test_int4_of_vllm(dim: int) -> None:
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    x = vectors(dim)
    expected, size = packed.each(single_rht(x).numpy(), packed.int4_hidden_zero, packed.from_int4_hidden_zero)
    block = dim & -dim
    check(Int4(), x, (single_rht(torch.tensor(expected).float(), inverse=True) / block).numpy(), size)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_levels_are_those_of_vllm(dim: int, bits: int) -> None:
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids

    torch.testing.assert_close(gaussian_levels(dim, bits), get_centroids(dim, bits), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", [3, 4])
def test_keys_of_turboquant(bits: int) -> None:
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard

    x, levels, matrix = vectors(64), get_centroids(64, bits).tolist(), _build_hadamard(64, "cpu")
    x[1, 3] = 1e-3

    def store(vector: list[float]) -> bytes:
        key = torch.tensor(vector)
        direction = (key / (key.norm() + 1e-8)) @ matrix
        return packed.turboquant_key(direction.tolist(), float(key.norm()), levels, bits)

    def read(data: bytes) -> list[float]:
        return (torch.tensor(packed.from_turboquant_key(data, levels, bits)) @ matrix).tolist()

    expected, size = packed.each(x.numpy(), store, read)
    check(LloydMax(bits), x, expected, size)
    assert size == HEADS * TOKENS * TurboQuantConfig(64, key_quant_bits=bits).key_packed_size


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_values_of_turboquant(dim: int, bits: int) -> None:
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    x = vectors(dim)
    expected, size = packed.each(
        x.numpy(), partial(packed.turboquant_value, bits=bits), partial(packed.from_turboquant_value, bits=bits)
    )
    check(Uniform(bits), x, expected, size)
    assert size == HEADS * TOKENS * TurboQuantConfig(dim, value_quant_bits=bits).value_packed_size


def test_truncation_is_the_best_of_its_rank() -> None:
    x = torch.cat([vectors(24) for _ in range(6)], 1) + torch.randn(HEADS, 6 * TOKENS, 24)
    mean = x.mean(1)
    covariance = torch.stack([head.T.cov(correction=0) for head in x])
    components = Components(mean, torch.linalg.eigh(covariance).eigenvectors.flip(-1))
    store = Truncated(components, 5)
    expected = []
    for head in x - mean[:, None]:
        u, s, vh = torch.linalg.svd(head, full_matrices=False)
        expected.append(u[:, :5] * s[:5] @ vh[:5])
    restored = store.restore(x, torch.arange(x.shape[1]))
    # bfloat16 keeps 8 bits of every latent.
    torch.testing.assert_close(
        restored - mean[:, None], torch.stack(expected), rtol=0, atol=2**-8 * float(x.abs().max())
    )
    assert store.size(10, 24, HEADS) == HEADS * 10 * 5 * 16


@pytest.mark.parametrize(("values", "bits"), [([0, 8], 3), ([-1, 3], 4), ([0.5, 1.0], 4)])
def test_a_field_holds_no_more_than_its_bits(values: list[float], bits: int) -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        Field(torch.tensor(values), bits)

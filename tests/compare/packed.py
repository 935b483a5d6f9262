"""Peers once more, one number after another, in plain Python: from a vector to bytes, and from bytes to a vector.

Slow and literal on purpose: what these functions write is as many bytes as `calibration.compare` claims to store.
"""

import math
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

Vector = list[float]


def pack_codes(codes: Sequence[int], bits: int) -> bytes:
    """Codes end to end, the first in the lowest bits."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    assert all(0 <= code < 1 << bits for code in codes)
    return number.to_bytes(math.ceil(len(codes) * bits / 8), "little")


def unpack_codes(data: bytes, bits: int) -> list[int]:
    number = int.from_bytes(data, "little")
    return [(number >> (bits * place)) % (1 << bits) for place in range(len(data) * 8 // bits)]


def min_max(vector: Vector, bits: int) -> bytes:
    """float16 least element, float16 step, codes counted in steps from the least element."""
    least = np.float16(min(np.float32(x) for x in vector))
    step = (np.float32(max(vector)) - np.float32(least)) / np.float32(2**bits - 1)
    step = np.float16(max(step, np.float32(2**-14)))
    counted = [round(float((np.float32(x) - np.float32(least)) / np.float32(step))) for x in vector]
    return struct.pack("<ee", least, step) + pack_codes([min(max(c, 0), 2**bits - 1) for c in counted], bits)


def from_min_max(data: bytes, bits: int) -> Vector:
    least, step = struct.unpack("<ee", data[:4])
    return [least + step * code for code in unpack_codes(data[4:], bits)]


def float8(byte: int) -> float:
    """What a byte stands for as e4m3 without infinities: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -size if byte & 128 else size


def nearest_float8(x: float) -> int:
    """The byte nearest to x, ties to the even one; 127 and 255 are no numbers."""
    sign = 128 if x < 0 else 0
    return min((b | sign for b in range(127)), key=lambda b: (abs(float8(b) - x), b & 1))


def half_away(x: float) -> int:
    return int(x + 0.5) if x >= 0 else int(x - 0.5)


def int8_scaled(vector: Vector) -> bytes:
    """float32 scale, then signed bytes."""
    scale = max(np.float32(max(map(abs, vector))) / np.float32(127), np.float32(1e-6))
    codes = [half_away(float(np.float32(x) * (np.float32(1) / scale))) for x in vector]
    return struct.pack(f"<f{len(codes)}b", scale, *codes)


def from_int8_scaled(data: bytes) -> Vector:
    scale, *codes = struct.unpack(f"<f{len(data) - 4}b", data)
    return [scale * code for code in codes]


def float8_scaled(vector: Vector) -> bytes:
    scale = max(np.float32(max(map(abs, vector))) / np.float32(448), np.float32(1e-6))
    return struct.pack("<f", scale) + bytes(
        nearest_float8(float(np.float32(x) * (np.float32(1) / scale))) for x in vector
    )


def from_float8_scaled(data: bytes) -> Vector:
    (scale,) = struct.unpack("<f", data[:4])
    return [scale * float8(byte) for byte in data[4:]]


def int4_hidden_zero(turned: Vector) -> bytes:
    """vLLM's int4 of a vector that is rotated already: a float32 whose last 4 bits are the zero, then nibbles."""
    scale = max((np.float32(max(turned)) - np.float32(min(turned))) / np.float32(15), np.float32(1e-6))
    zero = min(max(half_away(float(-np.float32(min(turned)) / scale)), 0), 15)
    inverse = np.float32(1) / scale
    codes = [min(max(half_away(float(np.float32(x) * inverse + np.float32(zero))), 0), 15) for x in turned]
    (word,) = struct.unpack("<I", struct.pack("<f", scale))
    return struct.pack("<I", word & 0xFFFFFFF0 | zero) + pack_codes(codes, 4)


def from_int4_hidden_zero(data: bytes) -> Vector:
    (word,) = struct.unpack("<I", data[:4])
    (scale,) = struct.unpack("<f", struct.pack("<I", word & 0xFFFFFFF0))
    return [scale * (code - (word & 15)) for code in unpack_codes(data[4:], 4)]


def turboquant_key(direction: Vector, norm: float, levels: Vector, bits: int) -> bytes:
    """Codes of a rotated direction against levels, then the norm in float16."""
    middles = [(a + b) / 2 for a, b in pairwise(levels)]
    codes = [sum(x >= middle for middle in middles) for x in direction]
    return pack_codes(codes, bits) + struct.pack("<e", norm)


def from_turboquant_key(data: bytes, levels: Vector, bits: int) -> Vector:
    """The rotated key: levels brought to unit length, times the norm."""
    (norm,) = struct.unpack("<e", data[-2:])
    chosen = [levels[code] for code in unpack_codes(data[:-2], bits)]
    length = math.sqrt(sum(x * x for x in chosen))
    return [norm * x / length for x in chosen]


def turboquant_value(vector: Vector, bits: int) -> bytes:
    """Codes, float16 step, float16 least element; codes are counted in the step before it is rounded."""
    top = 2**bits - 1
    least = np.float32(min(vector))
    step = max((np.float32(max(vector)) - least) / np.float32(top), np.float32(1e-8))
    codes = [min(max(int((np.float32(x) - least) / step + np.float32(0.5)), 0), top) for x in vector]
    return pack_codes(codes, bits) + struct.pack("<ee", step, least)


def from_turboquant_value(data: bytes, bits: int) -> Vector:
    step, least = struct.unpack("<ee", data[-4:])
    return [least + step * code for code in unpack_codes(data[:-4], bits)]


def hadamard(vector: Vector) -> Vector:
    """H x, blocks of the largest power of two: entry (i, j) of H is -1 to the number of ones that i and j share."""
    size = 1
    while len(vector) % (2 * size) == 0:
        size *= 2
    return [
        sum((-1) ** (i & j).bit_count() * vector[start + j] for j in range(size))
        for start in range(0, len(vector), size)
        for i in range(size)
    ]


def each(
    x: "np.ndarray", store: Callable[[Vector], bytes], read: Callable[[bytes], Vector]
) -> tuple["np.ndarray", int]:
    """All vectors of [H, T, D] there and back, and the bytes of all."""
    data = [store(vector) for vector in x.reshape(-1, x.shape[-1]).tolist()]
    return np.array([read(packed) for packed in data]).reshape(x.shape), sum(map(len, data))

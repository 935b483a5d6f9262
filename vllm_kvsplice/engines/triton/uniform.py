"""Attention to stored tokens whose levels are evenly spaced: codes are multiplied as they are, in whole numbers.

A latent is `step` * code + `offset`, so `step` goes into the query and into the sums, `offset` becomes one number for each
query and one for each sum. Queries and probabilities have 15 bits and a sign: 128 * high + low, two columns of a product
of whole numbers of eight bits.
"""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.codes import as_bytes, parts, rotate_right, transposed

# 128 * 127, the largest number that two bytes with seven bits each hold.
LARGEST = tl.constexpr(16256.0)
LOG2_LARGEST = tl.constexpr(13.988684686772167)
# Sums of products begin at the bits of this float32; up to 2**22 more or less, they are then the float32 this many higher.
ORIGIN, ORIGIN_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)


@triton.jit
def halves(number):
    """int32 [N, 2 * R] of seven bits and a sign, columns 128 * high + low side by side, from int32 [N, R]."""
    high = (number + 64) >> 7
    return tl.reshape(tl.join(high, number - high * 128), (number.shape[0], 2 * number.shape[1]))


@triton.jit
def whole(sums):
    """float32 [N, R], 128 * high + low, from int32 [N, 2 * R] that began at ORIGIN_BITS."""
    pairs = tl.reshape(sums.to(tl.float32, bitcast=True), (sums.shape[0], sums.shape[1] // 2, 2))
    high, low = tl.split(pairs)
    return (high - ORIGIN) * 128 + (low - ORIGIN)


@triton.jit
def stacked(upper, lower):
    """[2 * N, R]: `upper` [N, R] above `lower`."""
    return tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (2 * upper.shape[0], upper.shape[1]))


@triton.jit
def fine_halves(x):
    """float16 [N, 2 * R], a number and what rounding took from it side by side, from float32 [N, R]."""
    high = x.to(tl.float16).to(tl.float32)
    return tl.reshape(tl.join(high, x - high), (x.shape[0], 2 * x.shape[1])).to(tl.float16)


@triton.jit
def four_codes(page, fields, latents, row_words: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr):
    """Codes of four latents in a row, uint32 [N, WORDS] each with four tokens a word, of the tokens from `page` on.

    The first plane of four latents lies in two bytes where it has four bits, else in one, and each further plane in one.

    Args:
        fields: pointers [N] to the first latent of each four (`Tables.fields`).
        row_words: words between two bytes of a token.

    """
    byte, rotation, mask = parts(tl.load(fields))
    bits, apart = tl.where(mask == 15, 4, tl.where(mask == 3, 2, 1)), mask == 15
    word = page + tl.arange(0, WORDS)[None, :]
    row = word + (byte * row_words)[:, None]
    near = tl.load(row, (mask > 0)[:, None], 0).to(tl.uint32)
    far = tl.load(row + row_words, apart[:, None], 0).to(tl.uint32)
    far |= near & tl.where(apart, 0, 0xFFFFFFFF).to(tl.uint32)[:, None]
    first = field(near, rotation, mask)
    second = field(near, (rotation + bits) & 7, mask)
    third = field(far, (rotation + 2 * bits) & 7, mask)
    fourth = field(far, (rotation + 3 * bits) & 7, mask)
    for plane in tl.static_range(1, PLANES):
        byte, rotation, mask = parts(tl.load(fields + plane * latents))
        bits = tl.where(mask == 0x30, 2, 1)
        packed = tl.load(word + (byte * row_words)[:, None], (mask > 0)[:, None], 0).to(tl.uint32)
        first |= field(packed, rotation, mask)
        second |= field(packed, (rotation + bits) & 31, mask)
        third |= field(packed, (rotation + 2 * bits) & 31, mask)
        fourth |= field(packed, (rotation + 3 * bits) & 31, mask)
    return first, second, third, fourth


@triton.jit
def field(word, rotation, mask):
    """Bits under `mask` [N] of each byte of words [N, W] after a rotation [N]."""
    return rotate_right(word, rotation.to(tl.uint32)[:, None]) & (mask.to(tl.uint32) * 0x01010101)[:, None]


@triton.jit
def key_bytes(page, fields, latents, row_words: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr):
    """Codes of keys, int8 [4 * WORDS tokens, D], in the order of `codes.shuffled`."""
    first, second, third, fourth = four_codes(page, fields, latents, row_words, WORDS, PLANES)
    return as_bytes(transposed(first, second, third, fourth))


@triton.jit
def value_bytes(page, fields, latents, row_words: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr):
    """Codes of values, int8 [D, 4 * WORDS tokens]; the first of each four latents, then the second, and so on."""
    first, second, third, fourth = four_codes(page, fields, latents, row_words, WORDS, PLANES)
    four = tl.permute(tl.join(tl.join(first, third), tl.join(second, fourth)), (2, 3, 0, 1))
    return as_bytes(tl.reshape(four, (4 * first.shape[0], first.shape[1])))

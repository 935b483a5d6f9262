"""Attention to stored tokens whose levels are evenly spaced: codes are multiplied as they are, in whole numbers.

A latent is `step` * code + `offset`, so `step` goes into the query and into the sums, `offset` becomes one number for each
query and one for each sum. Queries and probabilities have 15 bits and a sign: 128 * high + low, two columns of a product
of whole numbers of eight bits.
"""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.kernels.codes import as_bytes, dealt, parts, rotate_right, shuffled, transposed
from vllm_kvsplice.engines.triton.kernels.means import beginning, stacked, turned, turns, waves
from vllm_kvsplice.engines.triton.kernels.softmax import normalised

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
def fine_halves(x):
    """float16 [N, 2 * R], a number and what rounding took from it side by side, from float32 [N, R]."""
    high = x.to(tl.float16).to(tl.float32)
    return tl.reshape(tl.join(high, x - high), (x.shape[0], 2 * x.shape[1])).to(tl.float16)


@triton.jit
def four_words(page, fields, latents, row_words: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr):
    """Words that hold codes of four latents in a row, uint32 [N, WORDS] of four tokens a word, from `page` on.

    The first plane of four latents lies in two bytes where it has four bits, else in one, and each further plane in one.

    Args:
        fields: pointers [N] to the first latent of each four (`Tables.fields`).
        row_words: words between two bytes of a token.

    """
    word = page + tl.arange(0, WORDS)[None, :]
    byte, _, mask = parts(tl.load(fields))
    row = word + (byte * row_words)[:, None]
    near = tl.load(row, (mask > 0)[:, None], 0).to(tl.uint32)
    words = (near, tl.load(row + row_words, (mask == 15)[:, None], 0).to(tl.uint32))
    for plane in tl.static_range(1, PLANES):
        byte, _, mask = parts(tl.load(fields + plane * latents))
        row = word + (byte * row_words)[:, None]
        words += (tl.load(row, (mask > 0)[:, None], 0).to(tl.uint32),)
    return words


@triton.jit
def four_codes(words, fields, latents, PLANES: tl.constexpr):
    """Codes of each of the four latents, uint32 [N, WORDS] with four tokens a word, from what `four_words` returns."""
    near, far = words[0], words[1]
    _, rotation, mask = parts(tl.load(fields))
    bits, apart = tl.where(mask == 15, 4, tl.where(mask == 3, 2, 1)), mask == 15
    far |= near & tl.where(apart, 0, 0xFFFFFFFF).to(tl.uint32)[:, None]
    first = field(near, rotation, mask)
    second = field(near, (rotation + bits) & 7, mask)
    third = field(far, (rotation + 2 * bits) & 7, mask)
    fourth = field(far, (rotation + 3 * bits) & 7, mask)
    for plane in tl.static_range(1, PLANES):
        _, rotation, mask = parts(tl.load(fields + plane * latents))
        bits = tl.where(mask == 0x30, 2, 1)
        first |= field(words[plane + 1], rotation, mask)
        second |= field(words[plane + 1], (rotation + bits) & 31, mask)
        third |= field(words[plane + 1], (rotation + 2 * bits) & 31, mask)
        fourth |= field(words[plane + 1], (rotation + 3 * bits) & 31, mask)
    return first, second, third, fourth


@triton.jit
def field(word, rotation, mask):
    """Bits under `mask` [N] of each byte of words [N, W] after a rotation [N]."""
    return rotate_right(word, rotation.to(tl.uint32)[:, None]) & (mask.to(tl.uint32) * 0x01010101)[:, None]


@triton.jit
def key_bytes(words, fields, latents, PLANES: tl.constexpr):
    """Codes of keys, int8 [4 * WORDS tokens, D], in the order of `codes.shuffled`."""
    first, second, third, fourth = four_codes(words, fields, latents, PLANES)
    return as_bytes(transposed(first, second, third, fourth))


@triton.jit
def value_bytes(words, fields, latents, PLANES: tl.constexpr):
    """Codes of values, int8 [D, 4 * WORDS tokens]; tokens in the order of `dealt`, latents in one that `by_latent` undoes.

    With 128 latents and 64 tokens a thread that has loaded rows of words then holds just those codes that the product wants
    of it, so they stay in its registers.
    """
    first, second, third, fourth = four_codes(words, fields, latents, PLANES)
    four = tl.join(tl.join(first, third), tl.join(second, fourth))
    near: tl.constexpr = min(8, first.shape[0])
    four = tl.reshape(four, (first.shape[0] // near, near, first.shape[1] // 4, 4, 2, 2))
    return as_bytes(tl.reshape(tl.permute(four, (4, 0, 5, 1, 3, 2)), (4 * first.shape[0], first.shape[1])))


@triton.jit
def by_latent(sums):
    """[D, R] in the latents' order from that of `value_bytes`."""
    near: tl.constexpr = min(8, sums.shape[0] // 4)
    parts = tl.reshape(sums, (2, sums.shape[0] // 4 // near, 2, near, sums.shape[1]))
    return tl.reshape(tl.permute(parts, (1, 3, 0, 2, 4)), (sums.shape[0], sums.shape[1]))


@triton.jit
def attend_uniform(
    query, absorbed, pages, block_table, tables, partial, rows, place, real, until, head, split, splits, scale, page_stride,
    HEADS_DIM, HEAD_DIM: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """As `lookup.attend_any`, where levels are evenly spaced."""
    key_latent, value_latent, even, odd, z_query, top, sink_weight, sink_sums = beginning(
        query, absorbed, pages, block_table, tables, partial, rows, place, real, until, head, split, scale, page_stride,
        HEADS_DIM, HEAD_DIM, D, PAIRS, ROWS, PAGE, PLANES,
    )  # fmt: skip

    # Queries as whole numbers, in a unit of each row's own; what the offsets add is one number a row.
    z_query *= tl.load(tables.step + key_latent)[:, None]
    unit = tl.max(tl.abs(z_query), 0) / LARGEST
    unit = tl.where(unit > 0, unit, 1)
    number = tl.floor(z_query / unit[None, :] + 0.5)
    constant = tl.sum(number * tl.load(tables.offset + key_latent)[:, None], 0) * unit * scale
    whole_query = halves(number.to(tl.int32)).to(tl.int8)
    unit *= scale
    amplitude = tl.sqrt(tl.max(even * even + odd * odd, 0))
    amplitude = tl.where(amplitude > 0, amplitude, 1)
    even, odd = even / amplitude[None, :], odd / amplitude[None, :]
    amplitude *= scale

    tiles = tl.cdiv(tl.max(until), TILE)
    share = tl.cdiv(tiles, splits)
    cos_first, sin_first, cos, sin = turns(tables, split * share * TILE, HEAD_DIM, PAIRS, TILE)
    even, odd = turned(even, odd, cos_first, sin_first)

    four = tl.arange(0, D // 4) * 4
    four = tables.fields + head * HEAD_DIM + tl.where(four < HEAD_DIM, four, 0)
    token = shuffled(tl.arange(0, TILE), TILE)
    wave = waves(tables, token, HEAD_DIM, PAIRS)
    totals, sums = tl.zeros((TILE, ROWS), tl.float32), tl.zeros((D, ROWS), tl.float32)
    # What new maxima have multiplied the sums by so far.
    shrunk = tl.full((ROWS,), 1, tl.float32)
    begin, end = split * share, tl.minimum(split * share + share, tiles)
    # Bytes are asked for one tile ahead, and page numbers two; past the end all read page 0.
    block = tl.load(block_table + begin * TILE // PAGE, begin < end, 0)
    page = pages + block.to(tl.int64) * page_stride + begin * TILE % PAGE // 4
    key_words = four_words(page, four, 2 * HEADS_DIM, PAGE // 4, TILE // 4, PLANES)
    value_words = four_words(page, four + HEADS_DIM, 2 * HEADS_DIM, PAGE // 4, TILE // 4, PLANES)
    block = tl.load(block_table + (begin + 1) * TILE // PAGE, begin + 1 < end, 0)
    for tile in range(begin, end):
        keys = key_bytes(key_words, four, 2 * HEADS_DIM, PLANES)
        page = pages + block.to(tl.int64) * page_stride + (tile + 1) * TILE % PAGE // 4
        key_words = four_words(page, four, 2 * HEADS_DIM, PAGE // 4, TILE // 4, PLANES)
        block = tl.load(block_table + (tile + 2) * TILE // PAGE, tile + 2 < end, 0)
        mean = tl.dot(wave, fine_halves(stacked(even, odd)))
        mean_high, mean_low = tl.split(tl.reshape(mean, (TILE, ROWS, 2)))
        products = tl.dot(keys, whole_query, tl.full((TILE, 2 * ROWS), ORIGIN_BITS, tl.int32), out_dtype=tl.int32)
        scores = whole(products) * unit[None, :] + ((mean_high + mean_low) * amplitude[None, :] + constant[None, :])
        position = tile * TILE + token
        visible = (position[:, None] < until[None, :]) & (position > 0)[:, None]
        scores = tl.where(visible, scores, float("-inf"))

        # Probabilities count from the tile's own maximum, so that small ones keep their bits beside larger ones elsewhere.
        tile_top = tl.max(scores, 0)
        new_top = tl.maximum(top, tile_top)
        # Where nothing is visible there is no maximum.
        base, shift = tl.where(tile_top == float("-inf"), 0, tile_top), tl.where(new_top == float("-inf"), 0, new_top)
        weight, factor, top = tl.exp2(tile_top - shift), tl.exp2(top - shift), new_top
        probability = tl.exp2(scores - base[None, :] + LOG2_LARGEST) + ORIGIN
        totals = totals * factor[None, :] + (probability - ORIGIN) * weight[None, :]
        shrunk *= factor
        counts = dealt(halves(probability.to(tl.int32, bitcast=True) - ORIGIN_BITS)).to(tl.int8)
        values = value_bytes(value_words, four + HEADS_DIM, 2 * HEADS_DIM, PLANES)
        value_words = four_words(page, four + HEADS_DIM, 2 * HEADS_DIM, PAGE // 4, TILE // 4, PLANES)
        products = tl.dot(values, counts, tl.full((D, 2 * ROWS), ORIGIN_BITS, tl.int32), out_dtype=tl.int32)
        sums = sums * factor[None, :] + whole(products) * weight[None, :]
        even, odd = turned(even, odd, cos, sin)

    total = tl.sum(totals, 0)
    sums = by_latent(sums) * tl.load(tables.step + value_latent)[:, None]
    sums += tl.load(tables.offset + value_latent)[:, None] * total[None, :]
    shrunk *= LARGEST
    return normalised(sums + sink_sums * shrunk[None, :], top, total + sink_weight * shrunk, LOG2_LARGEST)

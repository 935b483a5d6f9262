"""Attention to stored tokens whose levels are evenly spaced: codes are multiplied as they are, in whole numbers.

A latent is `step` * code + `offset`, so `step` goes into the query and into the sums, `offset` becomes one number for each
query and one for each sum. Queries and probabilities have 15 bits and a sign: 128 * high + low, two columns of a product
of whole numbers of eight bits. Codes of all widths end at bit 6 of their bytes (`Tables.aligned`), so that the first, which
have to move up, can be moved by products, and queries of wide and of narrow latents have as many bits.
"""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.kernels.codes import (
    as_bytes,
    dealt,
    parts,
    rotate_right,
    shift_left,
    shuffled,
    transposed,
)  # fmt: skip
from vllm_kvsplice.engines.triton.kernels.means import beginning, stacked, turned, turns, waves
from vllm_kvsplice.engines.triton.kernels.softmax import normalised

# 128 * 127, the largest number that two bytes with seven bits each hold.
LARGEST = tl.constexpr(16256.0)
LOG2_LARGEST = tl.constexpr(13.988684686772167)
# Whole numbers up to 2**22 that are added to this float32 are the lowest bits of the sum.
ORIGIN, ORIGIN_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)


@triton.jit
def halves(number):
    """int32 [N, 2 * R] of seven bits and a sign, columns 128 * high + low side by side, from int32 [N, R]."""
    high = (number + 64) >> 7
    return tl.reshape(tl.join(high, number - high * 128), (number.shape[0], 2 * number.shape[1]))


@triton.jit
def whole(sums):
    """float32 [N, R], 128 * high + low, from int32 [N, 2 * R]."""
    high, low = tl.split(tl.reshape(sums, (sums.shape[0], sums.shape[1] // 2, 2)))
    return (high * 128 + low).to(tl.float32)


@triton.jit
def fine_halves(x):
    """float16 [N, 2 * R], a number and what rounding took from it side by side, from float32 [N, R]."""
    high = x.to(tl.float16).to(tl.float32)
    return tl.reshape(tl.join(high, x - high), (x.shape[0], 2 * x.shape[1])).to(tl.float16)


@triton.jit
def four_fields(tables, latent, latents, HEAD_DIM: tl.constexpr, D: tl.constexpr, PLANES: tl.constexpr):
    """`Tables.aligned` of the first latent of each four of a head, int32 [D / 4] for each plane; its first is `latent`."""
    four = tl.arange(0, D // 4) * 4
    four = tables.aligned + latent + tl.where(four < HEAD_DIM, four, 0)
    fields = ()
    for plane in tl.static_range(PLANES):
        fields += (tl.load(four + plane * latents),)
    return fields


@triton.jit
def four_places(fields, row_words: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr):
    """Where in a page the words lie that hold codes of four latents in a row, int32 [N, WORDS] of four tokens a word.

    The first plane of four latents lies in two bytes where it has four bits, else in one, and each further plane in one.

    Args:
        fields: what `four_fields` returns.
        row_words: words between two bytes of a token.

    """
    word = tl.arange(0, WORDS)[None, :]
    byte, _, mask = parts(fields[0])
    places = ((byte * row_words)[:, None] + word, ((byte + (plane_bits(mask) == 4)) * row_words)[:, None] + word)
    for plane in tl.static_range(1, PLANES):
        byte, _, _ = parts(fields[plane])
        places += ((byte * row_words)[:, None] + word,)
    return places


@triton.jit
def four_words(page, places, PLANES: tl.constexpr):
    """Those words, uint32, of the tokens from `page` on."""
    words = ()
    for i in tl.static_range(PLANES + 1):
        words += (tl.load(page + places[i]).to(tl.uint32),)
    return words


@triton.jit
def tile_page(pages, block_table, page_stride, tile, end, TILE: tl.constexpr, PAGE: tl.constexpr):
    """Pointer to a tile's first word of a page's first byte; in page 0 from tile `end` on."""
    first = tile * TILE
    block = tl.load(block_table + first // PAGE, tile < end, 0)
    return pages + block.to(tl.int64) * page_stride + (0 if TILE == PAGE else first % PAGE // 4)


@triton.jit
def four_codes(words, fields, PLANES: tl.constexpr):
    """Codes of each of the four latents, uint32 [N, WORDS] with four tokens a word, from what `four_words` returns.

    In their bytes they end at bit 6, so of the first plane's fields the first and the third, and of others' all but the
    fourth, never have to move down.
    """
    near, far = words[0], words[1]
    _, rotation, mask = parts(fields[0])
    bits = plane_bits(mask)
    further = rotation + tl.where(bits == 4, 0, 2 * bits)
    first, second = under(moved_up(near, rotation), mask), under(turned_right(near, rotation + bits), mask)
    third, fourth = under(moved_up(far, further), mask), under(turned_right(far, further + bits), mask)
    for plane in tl.static_range(1, PLANES):
        word = words[plane + 1]
        _, rotation, mask = parts(fields[plane])
        bits = plane_bits(mask)
        first |= under(moved_up(word, rotation), mask)
        second |= under(moved_up(word, rotation + bits), mask)
        third |= under(moved_up(word, rotation + 2 * bits), mask)
        fourth |= under(turned_right(word, rotation + 3 * bits), mask)
    return first, second, third, fourth


@triton.jit
def plane_bits(mask):
    """How many bits a mask has: one, two or four in a row."""
    lowest = mask & -mask
    return tl.where(mask == 15 * lowest, 4, tl.where(mask == 3 * lowest, 2, 1))


@triton.jit
def turned_right(word, rotation):
    """Words [N, W] rotated to the right by `rotation` [N], modulo 32."""
    return rotate_right(word, (rotation & 31).to(tl.uint32)[:, None])


@triton.jit
def moved_up(word, rotation):
    """The same for what ends further up in its byte, so that what falls off the word is not missed: a product."""
    return shift_left(word, (-rotation & 31).to(tl.uint32)[:, None])


@triton.jit
def under(word, mask):
    """Bits under `mask` [N] of each byte of words [N, W]."""
    return word & (mask.to(tl.uint32) * 0x01010101)[:, None]


@triton.jit
def key_bytes(words, fields, PLANES: tl.constexpr):
    """Codes of keys, int8 [4 * WORDS tokens, D], in the order of `codes.shuffled`."""
    first, second, third, fourth = four_codes(words, fields, PLANES)
    return as_bytes(transposed(first, second, third, fourth))


@triton.jit
def value_bytes(words, fields, PLANES: tl.constexpr):
    """Codes of values, int8 [D, 4 * WORDS tokens]; tokens in the order of `dealt`, latents in one that `by_latent` undoes.

    With 128 latents and 64 tokens a thread that has loaded rows of words then holds just those codes that the product wants
    of it, so they stay in its registers.
    """
    first, second, third, fourth = four_codes(words, fields, PLANES)
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
def tile_scores(codes, query, unit, wave, even, odd, amplitude, constant, position, until):
    """Scores of a tile, float32 [TILE, ROWS]; -inf where a token is not read."""
    high, low = tl.split(
        tl.reshape(tl.dot(wave, fine_halves(stacked(even, odd))), (position.shape[0], until.shape[0], 2))
    )
    mean = (high + low) * amplitude[None, :] + constant[None, :]
    score = whole(tl.dot(codes, query, out_dtype=tl.int32)) * unit[None, :] + mean
    visible = (position[:, None] < until[None, :]) & (position > 0)[:, None]
    return tl.where(visible, score, float("-inf"))


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
    begin, end = split * share, tl.minimum(split * share + share, tiles)
    cos_first, sin_first, cos, sin = turns(tables, begin * TILE, HEAD_DIM, PAIRS, TILE)
    even, odd = turned(even, odd, cos_first, sin_first)

    key_fields = four_fields(tables, head * HEAD_DIM, 2 * HEADS_DIM, HEAD_DIM, D, PLANES)
    value_fields = four_fields(tables, HEADS_DIM + head * HEAD_DIM, 2 * HEADS_DIM, HEAD_DIM, D, PLANES)
    key_places = four_places(key_fields, PAGE // 4, TILE // 4, PLANES)
    value_places = four_places(value_fields, PAGE // 4, TILE // 4, PLANES)
    token = shuffled(tl.arange(0, TILE), TILE)
    wave = waves(tables, token, HEAD_DIM, PAIRS)
    totals, sums = tl.zeros((TILE, ROWS), tl.float32), tl.zeros((D, ROWS), tl.float32)
    # What new maxima have multiplied the sums by so far.
    shrunk = tl.full((ROWS,), 1, tl.float32)
    # Scores are ahead by one tile, so that a product is under way while probabilities are computed, bytes of keys by two.
    page = tile_page(pages, block_table, page_stride, begin, end, TILE, PAGE)
    second = tile_page(pages, block_table, page_stride, begin + 1, end, TILE, PAGE)
    third = tile_page(pages, block_table, page_stride, begin + 2, end, TILE, PAGE)
    codes = key_bytes(four_words(page, key_places, PLANES), key_fields, PLANES)
    keys = four_words(second, key_places, PLANES)
    scores = tile_scores(codes, whole_query, unit, wave, even, odd, amplitude, constant, begin * TILE + token, until)
    for tile in range(begin, end):
        values = four_words(page, value_places, PLANES)
        page, second, third = second, third, tile_page(pages, block_table, page_stride, tile + 3, end, TILE, PAGE)
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
        codes = key_bytes(keys, key_fields, PLANES)
        keys = four_words(second, key_places, PLANES)
        even, odd = turned(even, odd, cos, sin)
        position = (tile + 1) * TILE + token
        scores = tile_scores(codes, whole_query, unit, wave, even, odd, amplitude, constant, position, until)
        products = tl.dot(value_bytes(values, value_fields, PLANES), counts, out_dtype=tl.int32)
        sums = sums * factor[None, :] + whole(products) * weight[None, :]

    total = tl.sum(totals, 0)
    sums = by_latent(sums) * tl.load(tables.step + value_latent)[:, None]
    sums += tl.load(tables.offset + value_latent)[:, None] * total[None, :]
    shrunk *= LARGEST
    return normalised(sums + sink_sums * shrunk[None, :], top, total + sink_weight * shrunk, LOG2_LARGEST)

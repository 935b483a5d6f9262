"""What is read without codes: the mean keys, as a series over positions, and position 0, which has a mean of its own."""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.kernels.codes import unpack

FULL_TURN = tl.constexpr(6.283185307179586)


@triton.jit
def turn(angle):
    """Cosine and sine in float32 of float64 angles of any size."""
    small = (angle - tl.floor(angle / FULL_TURN + 0.5) * FULL_TURN).to(tl.float32)
    return tl.cos(small), tl.sin(small)


@triton.jit
def load_query(query, rows, dims, mask):
    return tl.load(query + rows[None, :] + dims[:, None], mask, 0).to(tl.float32)


@triton.jit
def mean_terms(query, rows, real, head, tables, HEADS_DIM, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """Coefficients [pairs, rows] of the cosines and of the sines of the mean keys' series at position 0."""
    pair = tl.arange(0, PAIRS)
    used = pair < HEAD_DIM // 2
    mask = used[:, None] & real[None, :]
    i = tl.load(tables.pairs + pair, used, 0)
    k = tl.load(tables.pairs + HEAD_DIM // 2 + pair, used, 0)
    q_i, q_k = load_query(query, rows, i, mask), load_query(query, rows, k, mask)
    mean_i = tl.load(tables.mean + head * HEAD_DIM + i)[:, None]
    mean_k = tl.load(tables.mean + head * HEAD_DIM + k)[:, None]
    return q_i * mean_i + q_k * mean_k, q_k * mean_i - q_i * mean_k


@triton.jit
def turned(even, odd, cos, sin):
    """The coefficients further on, by the angles of `cos` and `sin` [pairs]."""
    return even * cos[:, None] + odd * sin[:, None], odd * cos[:, None] - even * sin[:, None]


@triton.jit
def turns(tables, first, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr):
    """Cosines and sines [pairs] of the pairs' angles at position `first`, then those of a tile's length."""
    pair = tl.arange(0, PAIRS)
    frequency = tl.load(tables.pair_frequencies + pair, pair < HEAD_DIM // 2, 0)
    cos_first, sin_first = turn(frequency * first.to(tl.float64))
    cos_tile, sin_tile = turn(frequency * TILE)
    return cos_first, sin_first, cos_tile, sin_tile


@triton.jit
def waves(tables, token, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """Cosines, then sines, of the pairs' angles at positions `token` [T] of a tile: float16 [T, 2 * PAIRS]."""
    column = tl.arange(0, 2 * PAIRS)
    pair = column % PAIRS
    wave = tables.waves + token[:, None] * HEAD_DIM + (column // PAIRS * (HEAD_DIM // 2) + pair)[None, :]
    return tl.load(wave, (pair < HEAD_DIM // 2)[None, :], 0)


@triton.jit
def stacked(upper, lower):
    """[2 * N, R]: `upper` [N, R] above `lower`."""
    return tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (2 * upper.shape[0], upper.shape[1]))


@triton.jit
def read_sink(
    query, z_query, pages, block_table, tables, partial, rows, place, real, until, key_latent, value_latent, split,
    scale, page_stride, HEADS_DIM, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    PLANES: tl.constexpr,
):  # fmt: skip
    """Position 0, which has units and a mean of its own, for the first split; in float32: much attention falls on it.

    Returns:
        Its scores [rows], weights [rows], 1 where it is read and else 0, and its value latents times these [D, rows].

    """
    top, weight = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((D, ROWS), tl.float32)
    if split == 0:
        page = pages + tl.load(block_table).to(tl.int64) * page_stride
        z = decoded(page, tables, key_latent, HEADS_DIM, PAGE, PLANES)
        y = decoded(page, tables, value_latent, HEADS_DIM, PAGE, PLANES)
        latent = tl.arange(0, D)
        mean = tl.load(tables.sink + key_latent)[:, None]
        q = load_query(query, rows, latent, (latent < HEAD_DIM)[:, None] & real[None, :])
        top = tl.where(until > 0, tl.sum(z_query * z + q * mean, 0) * scale, float("-inf"))
        tl.store(partial.sink_scores + place, top, real)
        weight = tl.where(until > 0, 1.0, 0.0)
        sums = y * weight[None, :]
    return top, weight, sums


@triton.jit
def decoded(page, tables, latent, HEADS_DIM, PAGE: tl.constexpr, PLANES: tl.constexpr):
    """Latents [D, 1] of position 0 in its own units; `page` holds it first."""
    code = unpack(page, tables.fields + latent, PAGE // 4, 2 * HEADS_DIM, 1, PLANES) & 255
    level = tl.load(tables.levels + (latent // 8 * 256)[:, None] + code).to(tl.float32)
    return level * tl.load(tables.sink_scale + latent)[:, None]


@triton.jit
def beginning(
    query, absorbed, pages, block_table, tables, partial, rows, place, real, until, head, split, scale, page_stride,
    HEADS_DIM, HEAD_DIM: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    PLANES: tl.constexpr,
):  # fmt: skip
    """Where a split of the stored tokens begins, whatever their levels.

    Returns:
        The head's latents among all, of keys and of values [D], beyond its own the first; what `mean_terms` returns;
        absorbed queries [D, rows], 0 beyond its own; what `read_sink` returns.

    """
    latent = tl.arange(0, D)
    used = latent < HEAD_DIM
    key_latent = head * HEAD_DIM + tl.where(used, latent, 0)
    value_latent = HEADS_DIM + key_latent
    even, odd = mean_terms(query, rows, real, head, tables, HEADS_DIM, HEAD_DIM, PAIRS)
    z_query = tl.load(absorbed + place[None, :] * HEAD_DIM + latent[:, None], used[:, None] & real[None, :], 0)
    top, weight, sums = read_sink(
        query, z_query, pages, block_table, tables, partial, rows, place, real, until, key_latent, value_latent, split,
        scale, page_stride, HEADS_DIM, HEAD_DIM, D, ROWS, PAGE, PLANES,
    )  # fmt: skip
    return key_latent, value_latent, even, odd, z_query, top, weight, sums

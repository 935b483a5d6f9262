"""What the GPU benchmark compares with: decode attention over dense keys and values of eight bits, split as ours is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64


@triton.jit
def decode_kernel(
    query, keys, values, sums, weights, context, splits, scale,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and KV head. Grid: (sequences, H, splits)."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    row, dim, token = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, TILE)
    place = (sequence * heads + head) * GROUP + row
    q = tl.load(query + place[None, :] * D + dim[:, None], (row < GROUP)[None, :], 0).to(tl.float16)
    cells = (sequence * heads + head).to(tl.int64) * context * D
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((D, ROWS), tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), splits) * TILE
    for first in range(split * share, tl.minimum(split * share + share, context), TILE):
        at = cells + (first + token)[:, None] * D + dim[None, :]
        scores = tl.dot(tl.load(keys + at).to(tl.float16), q) * scale
        new_top = tl.maximum(top, tl.max(scores, 0))
        probability, factor = tl.exp2(scores - new_top[None, :]), tl.exp2(top - new_top)
        top, total = new_top, total * factor + tl.sum(probability, 0)
        value = tl.trans(tl.load(values + at).to(tl.float16))
        acc = tl.dot(value, probability.to(tl.float16), acc * factor[None, :])
    place += split * tl.num_programs(0) * heads * GROUP
    written = row < GROUP
    tl.store(weights + place, tl.where(total > 0, top + tl.log2(total), float("-inf")), written)
    acc /= tl.where(total > 0, total, 1)[None, :]
    tl.store(sums + place[None, :].to(tl.int64) * D + dim[:, None], acc, written[None, :])


@triton.jit
def merge_kernel(sums, weights, output, splits, D: tl.constexpr):
    """Grid: (query rows,)."""
    row, rows, dim = tl.program_id(0), tl.num_programs(0), tl.arange(0, D)
    top, total, acc = -float("inf"), 0.0, tl.zeros((D,), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(weights + split * rows + row))
    for split in range(splits):
        weight = tl.exp2(tl.load(weights + split * rows + row) - top)
        total += weight
        acc += weight * tl.load(sums + (split * rows + row).to(tl.int64) * D + dim)
    tl.store(output + row * D + dim, acc / total)


def dense_decode(query: Tensor, keys: Tensor, values: Tensor, scale: float, splits: int) -> Tensor:
    """Attention of `query` [S, H * G, D] to `keys` and `values` [S, H, context, D] of any type: float32 like `query`."""
    sequences, heads, dim = query.shape
    kv_heads, context = keys.shape[1:3]
    group = heads // kv_heads
    assert context % TILE == 0
    sums = query.new_empty(splits, *query.shape, dtype=torch.float32)
    weights = query.new_empty(splits, sequences, heads, dtype=torch.float32)
    output = query.new_empty(query.shape, dtype=torch.float32)
    decode_kernel[sequences, kv_heads, splits](
        query, keys, values, sums, weights, context, splits, scale * 1.4426950408889634,
        GROUP=group, D=dim, ROWS=max(8, 1 << (group - 1).bit_length()), TILE=TILE,
    )  # fmt: skip
    merge_kernel[(sequences * heads,)](sums, weights, output, splits, D=dim)
    return output

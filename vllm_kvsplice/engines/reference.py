"""The reference engine: plain torch, the specification that every other engine is tested against.

Attention happens in the latent space. With key j decoded as m_K(j) + D_K z_j and value j as m_V + D_V y_j (docs/codec.md):

    score_j = q . m_K(j) + (D_K^T q) . z_j               D_K is absorbed into the query once
    output  = sum_j p_j m_V(j) + D_V sum_j p_j y_j       D_V is applied once, after the sum

Position 0 has the sink in place of its mean, and its latents in units of their own.

Everything is summed in float64 and rounded once, so that an answer hardly depends on what else is in the batch: a last bit
that differs in one layer's output can flip a code in the next, and from there the difference grows (docs/codec.md).

Names: T tokens of the step, S sequences, H KV heads, G query heads per KV head, D head dimensions, R2 = 2 * H * D
latents, pages uint8 [B blocks, C bytes per token, N tokens per block].
"""

from collections import defaultdict
from itertools import pairwise

import torch
from torch import Tensor

from vllm_kvsplice.codec import LayerCodec

# Query rows attended at once, which bounds the memory that scores take.
_QUERY_ROWS = 128


def write(codec: LayerCodec, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, pages: Tensor) -> None:
    """Encode a step's tokens into `pages`.

    Args:
        codec: of this layer and rank.
        key, value: [T, H, D]; keys after rotation.
        positions: int64 [T], the token's place in its sequence.
        slots: int64 [T], block * N + offset; -1 marks padding, which is skipped.
        pages: written in place; only bytes of the given slots change.

    """
    real = slots >= 0
    key, value, positions, slots = key[real], value[real], positions[real], slots[real]
    block_size = pages.shape[2]
    packed = codec.pack(codec.encode(key, value, positions))
    pages[slots // block_size, :, slots % block_size] = packed


def attend(
    codec: LayerCodec,
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    query_start: list[int],
    seq_lens: list[int],
    scale: float,
) -> Tensor:
    """Causal attention of a step's queries to everything stored, themselves included.

    Args:
        codec: of this layer and rank.
        query: [T, H * G, D]; query head h * G + g reads KV head h.
        pages: uint8 [B, C, N].
        block_table: int [S, at least the number of blocks that the longest sequence has].
        query_start: S + 1 offsets of the sequences' queries in `query`.
        seq_lens: tokens stored of each sequence, this step's included; its queries are the last of them.
        scale: of the scores.

    Returns:
        float32 [query_start[-1], H * G, D].

    """
    output = torch.empty(query_start[-1], *query.shape[1:], dtype=torch.float32, device=query.device)
    same_length = defaultdict(list)
    for sequence, (start, end) in enumerate(pairwise(query_start)):
        same_length[end - start].append(sequence)
    for length, sequences in same_length.items():
        if length:
            rows = torch.tensor([range(query_start[s], query_start[s + 1]) for s in sequences], device=query.device)
            lengths = torch.tensor([seq_lens[s] for s in sequences], device=query.device)
            output[rows] = _attend_batch(codec, query[rows].float(), pages, block_table[sequences], lengths, scale)
    return output


def _attend_batch(
    codec: LayerCodec, query: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """`attend` for sequences with the same number of queries Q: [S, Q, H * G, D]."""
    context = int(lengths.max())
    keys, values = _latents(codec, pages, block_table, lengths, context)
    mean_keys = codec.offset("key", torch.arange(context, device=query.device)).double()
    last = lengths[:, None] - query.shape[1] + torch.arange(query.shape[1], device=query.device)
    rows = zip(query.split(_QUERY_ROWS, 1), last.split(_QUERY_ROWS, 1), strict=True)
    return torch.cat([_attend_rows(codec, q, keys, values, mean_keys, at, scale) for q, at in rows], 1)


def _attend_rows(
    codec: LayerCodec, query: Tensor, keys: Tensor, values: Tensor, mean_keys: Tensor, last: Tensor, scale: float
) -> Tensor:
    """Queries [S, Q, H * G, D] that see positions up to `last` [S, Q]; latents as `_latents` gives them."""
    query = query.unflatten(2, (codec.num_kv_heads, -1)).double()
    absorbed = torch.einsum("sqhgd,hdr->sqhgr", query, codec.synthesis[0])
    scores = torch.einsum("sqhgr,shrc->shgqc", absorbed, keys)
    scores += torch.einsum("sqhgd,chd->shgqc", query, mean_keys)
    visible = torch.arange(keys.shape[-1], device=query.device) <= last[..., None]
    probability = (scores * scale).masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)

    latent = torch.einsum("shgqc,shrc->sqhgr", probability, values)
    output = torch.einsum("sqhgr,hdr->sqhgd", latent, codec.synthesis[1])
    # sum_j p_j m_V(j), where m_V is the mean everywhere but at position 0.
    on_sink = probability[..., :1].movedim(3, 1)
    output += codec.value.mean[:, None] + on_sink * (codec.value.sink - codec.value.mean)[:, None]
    return output.flatten(2, 3).float()


def _latents(
    codec: LayerCodec, pages: Tensor, block_table: Tensor, lengths: Tensor, context: int
) -> tuple[Tensor, Tensor]:
    """Latents of keys and values, [S, H, R, context] each; zero where nothing of the sequence is stored."""
    block_size = pages.shape[2]
    blocks = -(-context // block_size)
    table = block_table[:, :blocks].long()
    # Table entries past a sequence's end are stale: read the null block 0 instead and mask what it says.
    used = torch.arange(blocks, device=table.device) * block_size < lengths[:, None]
    stored = pages[torch.where(used, table, 0)].movedim(2, 0).flatten(2)[..., :context]
    latents = codec.decode(codec.unpack(stored)).unflatten(0, (2, codec.num_kv_heads, codec.head_dim)).movedim(3, 1)
    written = torch.arange(context, device=table.device) < lengths[:, None]
    latents = latents * written[:, None, None]
    latents[..., 0] *= codec.sink_scale[:, None]
    return latents[0].double(), latents[1].double()

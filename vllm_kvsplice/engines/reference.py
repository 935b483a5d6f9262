"""The reference engine: plain torch, the specification that every other engine is tested against.

Attention to what is stored happens in the latent space. With key j decoded as m_K(j) + D_K z_j and value j as
m_V + D_V y_j (docs/codec.md):

    score_j = q . m_K(j) + (D_K^T q) . z_j               D_K is absorbed into the query once
    output  = sum_j p_j m_V(j) + D_V sum_j p_j y_j       D_V is applied once, after the sum

Position 0 has the sink in place of its mean, and its latents in units of their own. Tokens of the exact window are read as
they are; one softmax covers both.

Everything is summed in float64 and rounded once, so that an answer hardly depends on what else is in the batch: a last bit
that differs in one layer's output can flip a code in the next, and from there the difference grows (docs/codec.md).

Names and the functions' arguments: `vllm_kvsplice.engines.contract`.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines.contract import Batch, Window

# Query rows attended at once, which bounds the memory that scores take.
_QUERY_ROWS = 128


def write(codec: LayerCodec, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, pages: Tensor) -> None:
    """See `Engine.write`."""
    real = slots >= 0
    key, value, positions, slots = key[real], value[real], positions[real], slots[real]
    block_size = pages.shape[2]
    packed = codec.pack(codec.encode(key, value, positions))
    pages[slots // block_size, :, slots % block_size] = packed


def write_window(key: Tensor, value: Tensor, slots: Tensor, pages: Tensor) -> None:
    """See `Engine.write_window`."""
    real = slots >= 0
    slots, block_size = slots[real], pages.shape[2]
    tokens = torch.cat((key[real], value[real]), -1).to(pages.dtype)
    pages[slots // block_size, :, slots % block_size] = tokens


def attend(
    codec: LayerCodec,
    query: Tensor,
    pages: Tensor,
    batch: Batch,
    scale: float,
    window: Window | None,
    output: Tensor | None = None,
) -> Tensor:
    """See `Engine.attend`."""
    starts, seq_lens = batch.query_start.tolist(), batch.seq_lens.tolist()
    if output is None:
        output = torch.empty(starts[-1], *query.shape[1:], dtype=torch.float32, device=query.device)
    same_length = defaultdict(list)
    for sequence, (start, end) in enumerate(pairwise(starts)):
        same_length[end - start].append(sequence)
    for length, sequences in same_length.items():
        if length:
            rows = torch.tensor([range(starts[s], starts[s + 1]) for s in sequences], device=query.device)
            lengths = torch.tensor([seq_lens[s] for s in sequences], device=query.device)
            exact = _Exact.of(window, window.block_table[sequences], lengths, length) if window else None
            table = batch.block_table[sequences]
            output[rows] = _attend_batch(codec, query[rows].float(), pages, table, lengths, scale, exact).to(
                output.dtype
            )
    return output


def _attend_batch(
    codec: LayerCodec,
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    exact: "_Exact | None",
) -> Tensor:
    """`attend` for sequences with the same number of queries Q: [S, Q, H * G, D]."""
    context = int(lengths.max())
    keys, values = _latents(codec, pages, block_table, lengths, context)
    mean_keys = codec.offset("key", torch.arange(context, device=query.device)).double()
    last = lengths[:, None] - query.shape[1] + torch.arange(query.shape[1], device=query.device)
    rows = zip(query.split(_QUERY_ROWS, 1), last.split(_QUERY_ROWS, 1), strict=True)
    return torch.cat([_attend_rows(codec, q, keys, values, mean_keys, at, scale, exact) for q, at in rows], 1)


def _attend_rows(
    codec: LayerCodec,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mean_keys: Tensor,
    last: Tensor,
    scale: float,
    exact: "_Exact | None",
) -> Tensor:
    """Queries [S, Q, H * G, D] that see positions up to `last` [S, Q]; latents as `_latents` gives them."""
    query = query.unflatten(2, (codec.num_kv_heads, -1)).double()
    absorbed = torch.einsum("sqhgd,hdr->sqhgr", query, codec.synthesis[0])
    scores = torch.einsum("sqhgr,shrc->shgqc", absorbed, keys)
    scores += torch.einsum("sqhgd,chd->shgqc", query, mean_keys)
    context = keys.shape[-1]
    stored_until = exact.begin(last) if exact else last + 1
    visible = torch.arange(context, device=query.device) < stored_until[..., None]
    if exact:
        scores = torch.cat((scores, torch.einsum("sqhgd,sehd->shgqe", query, exact.keys)), -1)
        visible = torch.cat((visible, exact.visible(last)), -1)
    probability = (scores * scale).masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)

    stored = probability[..., :context]
    latent = torch.einsum("shgqc,shrc->sqhgr", stored, values)
    output = torch.einsum("sqhgr,hdr->sqhgd", latent, codec.synthesis[1])
    # sum_j p_j m_V(j), where m_V is the mean everywhere but at position 0.
    on_stored, on_sink = stored.sum(-1, keepdim=True).movedim(3, 1), stored[..., :1].movedim(3, 1)
    output += on_stored * codec.value.mean[:, None] + on_sink * (codec.value.sink - codec.value.mean)[:, None]
    if exact:
        output += torch.einsum("shgqe,sehd->sqhgd", probability[..., context:], exact.values)
    return output.flatten(2, 3).float()


@dataclass(frozen=True)
class _Exact:
    """The window's tokens for sequences with the same number of queries Q: the E = Q + W - 1 last ones.

    Attributes:
        size: W.
        positions: [S, E], negative before a sequence's start.
        keys, values: float64 [S, E, H, D].
        chunk: [S], the step's first position, where all of it is exact.

    """

    size: int
    positions: Tensor
    keys: Tensor
    values: Tensor
    chunk: Tensor | None

    @classmethod
    def of(cls, window: Window, block_table: Tensor, lengths: Tensor, queries: int) -> "_Exact":
        size, block_size = min(window.size, int(lengths.max())), window.pages.shape[2]
        first = lengths - queries
        positions = first[:, None] + torch.arange(1 - size, queries, device=lengths.device)
        at = positions.clamp(min=0)
        tokens = window.pages[block_table.long().gather(1, at // block_size), :, at % block_size].double()
        tokens = torch.where((positions >= 0)[..., None, None], tokens, 0)
        keys, values = tokens.chunk(2, -1)
        return cls(size, positions, keys, values, first if window.whole_chunk else None)

    def begin(self, last: Tensor) -> Tensor:
        """First exact position of queries at positions `last` [S, Q]."""
        begin = last + 1 - self.size
        return begin if self.chunk is None else begin.minimum(self.chunk[:, None])

    def visible(self, last: Tensor) -> Tensor:
        """[S, Q, E]: which exact tokens each query reads."""
        positions = self.positions[:, None]
        begin = self.begin(last).clamp(min=0)
        return (positions >= begin[..., None]) & (positions <= last[..., None])


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

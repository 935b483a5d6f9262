"""The GPU engine: Triton kernels over packed pages (docs/gpu.md).

Importing this loads no Triton: an engine loads the kernels when it is made. With ``TRITON_INTERPRET=1`` set before that they
run on the CPU, slowly; so do tests without a GPU.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines.contract import Batch, Window
from vllm_kvsplice.engines.triton.tables import MAX_TILE, Exact, Partial, Sequences, Tables, tables_of

# Rows of a tile: what one matrix instruction takes, and what registers hold.
FEWEST_ROWS, MOST_ROWS = 16, 64
# Contexts are split until each multiprocessor has so many programs; more splits would make the merge slow.
PROGRAMS, MOST_SPLITS = 4, 32
TOKENS, CHUNK, WIDE = 16, 32, 64


class TritonEngine:
    """`Engine` on GPUs. No call waits for the GPU or needs a value that only the GPU knows, so graphs can capture all."""

    def __init__(self) -> None:
        from vllm_kvsplice.engines.triton import attention, encode

        self._attention: Any = attention
        self._encode: Any = encode

    def write(
        self, codec: LayerCodec, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, pages: Tensor
    ) -> None:
        """See `Engine.write`."""
        tokens, heads, dim = key.shape
        tables = _prepared(codec)
        assert key.stride(2) == value.stride(2) == 1
        if tokens:
            self._encode.encode_kernel[_tiles(tokens, TOKENS), 2 * heads](
                key, value, positions, slots, pages, tables, tokens, pages.stride(0), *key.stride()[:2],
                *value.stride()[:2], codec.layout.token_bytes, HEAD_DIM=dim, D=_padded(dim), PAGE=pages.shape[2],
                PLANES=len(tables.fields), WIDTH=_widest(codec), TOKENS=TOKENS, CHUNK=min(CHUNK, _padded(dim)),
                enable_fp_fusion=False,
            )  # fmt: skip

    def write_window(self, key: Tensor, value: Tensor, slots: Tensor, pages: Tensor) -> None:
        """See `Engine.write_window`."""
        tokens, heads, dim = key.shape
        assert key.stride(2) == value.stride(2) == pages.stride(3) == 1
        if tokens:
            self._encode.copy_kernel[tokens, heads](
                key, value, slots, pages, *key.stride()[:2], *value.stride()[:2], *pages.stride()[:3],
                HEAD_DIM=dim, D=_padded(dim), PAGE=pages.shape[2], num_warps=1,
            )  # fmt: skip

    def attend(
        self, codec: LayerCodec, query: Tensor, pages: Tensor, batch: Batch, scale: float, window: Window | None
    ) -> Tensor:
        """See `Engine.attend`."""
        tables, (tokens, heads, dim) = _prepared(codec), query.shape
        output = query.new_empty(query.shape, dtype=torch.float32)
        if not tokens:
            return output
        sequences, exact = _sequences(batch), _exact(window)
        shape = {"GROUP": heads // codec.num_kv_heads, "HEAD_DIM": dim}
        assert query.stride(2) == 1
        assert pages.stride()[1:] == (pages.shape[2], 1)
        rows, words = tokens * shape["GROUP"], pages.view(torch.int32)
        columns = {"ROWS": FEWEST_ROWS, "CHUNK": min(CHUNK, _padded(dim))}
        dense_grid = _tiles(rows, FEWEST_ROWS), codec.num_kv_heads, _tiles(dim, WIDE)
        absorbed = query.new_empty(query.shape, dtype=torch.float32)
        self._attention.absorb_kernel[dense_grid](
            query, tables.synthesis, absorbed, rows, *query.stride()[:2], **shape, **columns, LATENTS=WIDE
        )

        tile_rows = _tile_rows(rows, sequences.count)
        tiles = rows // tile_rows + sequences.count
        splits = _splits(tiles * codec.num_kv_heads, query.device)
        partial = _partial(query, splits + bool(window))
        self._attention.attend_kernel[tiles, codec.num_kv_heads, splits + bool(window)](
            query, absorbed, words, sequences, tables, exact, partial, tokens, splits, scale, *query.stride()[:2],
            words.stride(0), **shape, D=_padded(dim), PAIRS=_padded(dim // 2), ROWS=tile_rows, TILE=_tile_tokens(pages.shape[2], dim),
            PAGE=pages.shape[2], PLANES=len(tables.fields), EXACT_PAGE=window.pages.shape[2] if window else 0,
            WHOLE_CHUNK=bool(window and window.whole_chunk),
        )  # fmt: skip
        self._attention.finish_kernel[dense_grid](
            partial, tables, sequences.query_start, output, rows, sequences.count, splits,
            **shape, **columns, EXACT=bool(window), DIMS=WIDE,
        )  # fmt: skip
        return output


def _sequences(batch: Batch) -> Sequences:
    table = batch.block_table
    return Sequences(batch.query_start, batch.seq_lens, table, len(batch.seq_lens), table.stride(0))


def _exact(window: Window | None) -> Exact | None:
    if window is None:
        return None
    pages, table = window.pages, window.block_table
    assert pages.stride(3) == table.stride(1) == 1
    return Exact(window.size, pages, table, *pages.stride()[:3], table.stride(0))


def _partial(query: Tensor, splits: int) -> Partial:
    def new(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    return Partial(new(splits, *query.shape), new(splits, *query.shape[:2]), new(*query.shape[:2]))


def _tile_rows(rows: int, sequences: int) -> int:
    """So many that a sequence's share of a step fits one tile, if a tile can hold it."""
    return min(max(_power(rows // sequences), FEWEST_ROWS), MOST_ROWS)


def _tile_tokens(block_size: int, dim: int) -> int:
    """Tokens of a tile: a power of two that divides a page, and fewer for large heads, whose latents fill the registers."""
    return math.gcd(block_size, MAX_TILE if dim <= MAX_TILE * 2 else MAX_TILE // 2)


def _splits(programs: int, device: torch.device) -> int:
    return max(1, min(_tiles(PROGRAMS * _multiprocessors(device), programs), MOST_SPLITS))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _tiles(count: int, size: int) -> int:
    return -(-count // size)


def _power(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, count - 1).bit_length()


def _padded(dim: int) -> int:
    """Columns of a tile for a head's dimensions."""
    return max(FEWEST_ROWS, _power(dim))


def _widest(codec: LayerCodec) -> int:
    return max(width for kind in (codec.layout.key, codec.layout.value) for head in kind for width in head)


def _prepared(codec: LayerCodec) -> Tables:
    """The kernels' form of `codec`, made once."""
    fields = vars(codec)
    if "_triton" not in fields:
        fields["_triton"] = tables_of(codec)
    return fields["_triton"]

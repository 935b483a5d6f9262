"""The GPU engine: Triton kernels over packed pages (docs/gpu.md).

Importing this loads no Triton: the kernels are loaded when they are first used. With ``TRITON_INTERPRET=1`` set by then
they run on the CPU, slowly; so do tests without a GPU.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines.contract import Batch, Window
from vllm_kvsplice.engines.triton.tables import MAX_TILE, Exact, Partial, Segment, Sequences, State, Tables, tables_of
from vllm_kvsplice.errors import KVSpliceError

MOST_SPLITS = 64
# What a split costs, its beginning and its merging, as a share of all that one program would do.
SPLIT_COST = 0.02
# Of the kernels that are plain matrix products: rows (tokens, when encoding), columns, and columns of a step of the sum.
PRODUCT_ROWS, COLUMNS, STEP = 16, 64, 32
# Columns of the merge, and numbers of the splits' sums that it reads at once for a row.
MERGED_COLUMNS, MERGED_NUMBERS = 32, 1024
# Float32 numbers that a large step takes for each number of its queries: absorbed, one split, the window's part, output;
# and bytes of the segment that prompts rebuild.
WORKSPACE, SEGMENT_BYTES = 4, 128 << 20
# Rows of a sequence and KV head from which rebuilding for all at once is taken for cheaper than unpacking for every few.
PROMPT_ROWS = 64


class Tiling(NamedTuple):
    """Of attention over heads of up to `dim` dimensions, codes of up to `planes` planes and tiles of up to `rows` rows.

    Attributes:
        tokens: the most of a tile.
        warps: of a program.
        resident: programs that a multiprocessor holds at once.
        stages: tiles under way from memory, and the one that is worked on.

    """

    dim: int
    planes: int
    rows: int
    tokens: int
    warps: int
    resident: int
    stages: int = 1

    @property
    def registers(self) -> int:
        """The most that a thread can have of a multiprocessor's 65536, in steps of eight."""
        return min(65536 // (32 * self.warps * self.resident) // 8 * 8, 255)


# The first that fits is taken. Where levels are evenly spaced, so many programs are forced to fit a multiprocessor: values
# that then live in local memory are hardly ever needed in the loop over tokens (benchmarks.gpu_variants).
UNIFORM_TILINGS = (
    Tiling(dim=64, planes=3, rows=4, tokens=64, warps=4, resident=4),
    Tiling(dim=64, planes=3, rows=16, tokens=64, warps=4, resident=2),
    Tiling(dim=128, planes=2, rows=4, tokens=64, warps=4, resident=4),
    Tiling(dim=128, planes=3, rows=8, tokens=64, warps=4, resident=3),
    Tiling(dim=256, planes=3, rows=4, tokens=64, warps=8, resident=1),
)
# Else: the largest that spill no registers on sm_80 and sm_90.
TILINGS = (
    Tiling(dim=64, planes=3, rows=16, tokens=64, warps=4, resident=2, stages=3),
    Tiling(dim=128, planes=3, rows=16, tokens=64, warps=8, resident=1),
    Tiling(dim=256, planes=3, rows=16, tokens=16, warps=8, resident=1, stages=3),
)
# For prompts. With two stages 99 KiB of shared memory, what the smallest GPUs give a program, hold it.
PROMPT_TILINGS = (
    Tiling(dim=64, planes=3, rows=64, tokens=64, warps=4, resident=2, stages=3),
    Tiling(dim=128, planes=3, rows=64, tokens=64, warps=4, resident=2, stages=3),
    Tiling(dim=256, planes=3, rows=64, tokens=32, warps=8, resident=1, stages=3),
)


class TritonEngine:
    """`Engine` on GPUs. No call waits for the GPU or needs a value that only the GPU knows, so graphs can capture all."""

    def write(
        self, codec: LayerCodec, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, pages: Tensor
    ) -> None:
        """See `Engine.write`."""
        tokens, heads, dim = key.shape
        tables = _prepared(codec)
        assert key.stride(2) == value.stride(2) == 1
        assert pages.stride()[1:] == (pages.shape[2], 1)
        if tokens:
            # Few programs are smaller ones: what is done once for each is repeated, but nothing waits for it.
            few = _tiles(tokens, PRODUCT_ROWS) * 2 * heads * _tiles(dim, COLUMNS) < _multiprocessors(key.device)
            columns = min(COLUMNS // 2 if few else COLUMNS, _padded(dim))
            _encode().encode_kernel[_tiles(tokens, PRODUCT_ROWS), 2 * heads, _tiles(dim, columns)](
                key, value, positions, slots, pages, tables, tokens, pages.stride(0), *key.stride()[:2],
                *value.stride()[:2], codec.layout.token_bytes, HEAD_DIM=dim, LATENTS=columns, PAGE=pages.shape[2],
                PLANES=len(tables.fields), WIDTH=max(codec.layout.widths), TOKENS=PRODUCT_ROWS,
                STEP=min(STEP, _padded(dim)), enable_fp_fusion=False, num_warps=8,
            )  # fmt: skip

    def write_window(self, key: Tensor, value: Tensor, slots: Tensor, pages: Tensor) -> None:
        """See `Engine.write_window`."""
        tokens, heads, dim = key.shape
        assert key.stride(2) == value.stride(2) == pages.stride(3) == 1
        if tokens:
            _encode().copy_kernel[tokens, heads](
                key, value, slots, pages, *key.stride()[:2], *value.stride()[:2], *pages.stride()[:3],
                HEAD_DIM=dim, D=_padded(dim), PAGE=pages.shape[2], num_warps=1,
            )  # fmt: skip

    def attend(
        self,
        codec: LayerCodec,
        query: Tensor,
        pages: Tensor,
        batch: Batch,
        scale: float,
        window: Window | None,
        output: Tensor | None = None,
    ) -> Tensor:
        """See `Engine.attend`; rows past T hold zeros where sequences have few rows each."""
        if output is None:
            output = query.new_empty(query.shape, dtype=torch.float32)
        if len(query):
            assert query.stride(2) == 1
            assert output.stride()[1:] == (query.shape[2], 1)
            rows = query.shape[0] * query.shape[1] // codec.num_kv_heads
            if rows >= PROMPT_ROWS * len(batch.seq_lens):
                _attend_by_segments(codec, query, pages, batch, scale, window, output)
            else:
                partial = _read(codec, query, _absorb(codec, query), pages, batch, scale, window)
                _finish(codec, partial, batch, bool(window), output)
        return output

    def rehearse(
        self, codec: LayerCodec, query: Tensor, key: Tensor, value: Tensor, page: int, window: Window | None
    ) -> None:
        """Launch what steps launch, for a sequence without tokens: Triton compiles it, and no request has to wait.

        Args:
            codec: of this layer and rank.
            query, key, value: of T tokens, as in a step that computes most of them; not read.
            page: tokens of a block.
            window: with pages of its type, and a block table of two blocks or more.

        """
        nothing = query.new_zeros(2, dtype=torch.int32)
        batch = Batch(nothing, nothing[:1], nothing[None], page)
        pages = query.new_zeros(1, codec.layout.token_bytes, page, dtype=torch.uint8)
        slots, output = query.new_full(query.shape[:1], -1, dtype=torch.int64), query.new_empty(query.shape)
        for count in (1, len(query)):
            first = slice(count)
            self.write(codec, key[first], value[first], slots[first], slots[first], pages)
        if window:
            self.write_window(key, value, slots, window.pages)
        # Tiles of tokens hold powers of two of rows, up to where prompts begin.
        prompt = _tiles(PROMPT_ROWS * codec.num_kv_heads, query.shape[1])
        for count in {min(1 << power, prompt, len(query)) for power in range(_power(prompt).bit_length())}:
            self.attend(codec, query[:count], pages, batch, 1.0, window, output[:count])
        for power in range(MOST_SPLITS.bit_length()):
            partial = _partial(query[:1], (1 << power) + bool(window))
            _finish(codec, partial, batch, bool(window), output[:1])


def _absorb(codec: LayerCodec, query: Tensor) -> Tensor:
    """D_K^T q, float32 of `query`'s shape."""
    tokens, heads, dim = query.shape
    group = heads // codec.num_kv_heads
    absorbed = query.new_empty(query.shape, dtype=torch.float32)
    grid = _tiles(tokens * group, PRODUCT_ROWS), codec.num_kv_heads, _tiles(dim, COLUMNS)
    _attention().absorb_kernel[grid](
        query, _prepared(codec).synthesis, absorbed, tokens * group, *query.stride()[:2], GROUP=group, HEAD_DIM=dim,
        ROWS=PRODUCT_ROWS, COLUMNS=COLUMNS, STEP=min(2 * STEP, _padded(dim)), num_warps=8,
    )  # fmt: skip
    return absorbed


def _read(
    codec: LayerCodec, query: Tensor, absorbed: Tensor, pages: Tensor, batch: Batch, scale: float, window: Window | None
) -> Partial:
    """What each split of every sequence contributes."""
    assert pages.stride()[1:] == (pages.shape[2], 1)
    assert pages.shape[2] % 16 == 0
    words, tables, kv_heads = pages.view(torch.int32), _prepared(codec), codec.num_kv_heads
    (tokens, heads, dim), number = query.shape, len(batch.seq_lens)
    # Products of whole numbers take 32 at a time, and two columns for each row.
    uniform = tables.step is not None and pages.shape[2] % 32 == 0 and _padded(dim) >= 32
    rows, planes = tokens * heads // kv_heads, len(tables.fields)
    wanted = max(_power(_tiles(rows, number)), 4 if uniform else 8)
    tiling = _tiling(UNIFORM_TILINGS if uniform else TILINGS, dim, planes, wanted)
    tile_rows = min(wanted, tiling.rows)
    tiles = rows // tile_rows + number
    # Of `tiles`, those that hold rows where all sequences have as many.
    used = number * _tiles(_tiles(rows, number), tile_rows)
    splits = _splits(used * kv_heads, tiling.resident * _multiprocessors(query.device))
    partial = _partial(query, splits + bool(window))
    _attention().attend_kernel[tiles, kv_heads, splits + bool(window)](
        query, absorbed, words, _sequences(batch, window), tables, _exact(window), partial, tokens, number, splits, scale,
        *query.stride()[:2], words.stride(0), GROUP=heads // kv_heads, HEAD_DIM=dim, D=_padded(dim),
        PAIRS=_padded(dim // 2), ROWS=tile_rows, TILE=math.gcd(pages.shape[2], tiling.tokens), PAGE=pages.shape[2],
        PLANES=planes, EXACT_PAGE=window.pages.shape[2] if window else 0,
        WHOLE_CHUNK=bool(window and window.whole_chunk), UNIFORM=uniform, num_warps=tiling.warps,
        num_stages=tiling.stages, **_limited(tiling.registers),
    )  # fmt: skip
    return partial


def _attend_by_segments(
    codec: LayerCodec,
    query: Tensor,
    pages: Tensor,
    batch: Batch,
    scale: float,
    window: Window | None,
    output: Tensor,
) -> None:
    """Rebuild what is stored, a segment after the other, and attend to it."""
    assert pages.stride()[1:] == (pages.shape[2], 1)
    words, tables, kv_heads = pages.view(torch.int32), _prepared(codec), codec.num_kv_heads
    (tokens, heads, dim), number, page = query.shape, len(batch.seq_lens), pages.shape[2]
    padded, sequences, exact, rows = _padded(dim), _sequences(batch, window), _exact(window), tokens * heads // kv_heads
    tiling = _tiling(PROMPT_TILINGS, dim, len(tables.fields), _tiles(rows, number))
    longest = batch.block_table.shape[1] * page
    if batch.longest is not None:
        longest = min(longest, batch.longest)
    # A power of two of tokens, and whole tiles.
    fitting = SEGMENT_BYTES // (4 * number * kv_heads * padded)
    size = max(MAX_TILE, tiling.tokens, min(_power(fitting + 1) // 2, _power(longest)))
    rebuilt = query.new_empty(2, number, kv_heads, size, padded, dtype=torch.float16)
    held = query.shape if longest > size else (0, heads, dim)
    state = State(*(query.new_empty(shape, dtype=torch.float32) for shape in (held, held[:2], held[:2])))
    tile = math.gcd(page, MAX_TILE if padded <= 128 else MAX_TILE // 2)
    for begin in range(0, longest, size):
        segment = Segment(rebuilt, begin, size)
        _prompt().rebuild_kernel[size // tile, 2 * kv_heads, number](
            words, sequences, tables, segment, words.stride(0), HEAD_DIM=dim, D=padded, TILE=tile, PAGE=page,
            PLANES=len(tables.fields), COLUMNS=min(STEP, padded), num_warps=4,
        )  # fmt: skip
        _prompt().prompt_kernel[rows // tiling.rows + number, kv_heads](
            query, sequences, exact, segment, state, output, longest, number, scale, *query.stride()[:2],
            output.stride(0), GROUP=heads // kv_heads, HEAD_DIM=dim, D=padded, ROWS=tiling.rows, TILE=tiling.tokens,
            EXACT_PAGE=window.pages.shape[2] if window else 0, WHOLE_CHUNK=bool(window and window.whole_chunk),
            num_warps=tiling.warps, num_stages=min(tiling.stages, _stages(query.device)),
        )  # fmt: skip


def _finish(codec: LayerCodec, partial: Partial, batch: Batch, exact: bool, output: Tensor) -> None:
    """Merge into `output`, [T, H * G, D] in any floating dtype."""
    tokens, heads, dim = output.shape
    group = heads // codec.num_kv_heads
    rows, number, splits = tokens * group, len(batch.seq_lens), len(partial.sums) - exact
    grid = _tiles(rows, PRODUCT_ROWS), codec.num_kv_heads, _tiles(dim, MERGED_COLUMNS)
    _attention().finish_kernel[grid](
        partial, _prepared(codec), batch.query_start, output, rows, number, splits, output.stride(0), GROUP=group,
        HEAD_DIM=dim, D=_padded(dim), EXACT=exact, ROWS=PRODUCT_ROWS, COLUMNS=MERGED_COLUMNS, SPLITS=_power(splits),
        GATHER=min(_power(splits), MERGED_NUMBERS // _padded(dim)), num_warps=8,
    )  # fmt: skip


def _encode() -> Any:
    from vllm_kvsplice.engines.triton.kernels import encode

    return encode


def _attention() -> Any:
    from vllm_kvsplice.engines.triton.kernels import attention

    return attention


def _prompt() -> Any:
    from vllm_kvsplice.engines.triton.kernels import prompt

    return prompt


def _sequences(batch: Batch, window: Window | None) -> Sequences:
    table, exact = batch.block_table, window.block_table if window else None
    assert table.stride(1) == 1
    assert exact is None or exact.stride(1) == 1
    stride = 0 if exact is None else exact.stride(0)
    return Sequences(batch.query_start, batch.seq_lens, table, table.stride(0), exact, stride)


def _exact(window: Window | None) -> Exact | None:
    if window is None:
        return None
    pages = window.pages
    assert pages.stride(3) == 1
    page, head, token, _ = pages.stride()
    return Exact(window.size, pages, page, head, token)


def _partial(query: Tensor, splits: int) -> Partial:
    def new(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    return Partial(new(splits, *query.shape), new(splits, *query.shape[:2]), new(*query.shape[:2]))


def _limited(registers: int) -> dict[str, int]:
    """The option that limits a thread's registers; AMD's compiler has none."""
    return {} if torch.version.hip else {"maxnreg": registers}


@lru_cache
def _tiling(tilings: tuple[Tiling, ...], dim: int, planes: int, rows: int) -> Tiling:
    """The first that fits; where none takes so many rows, the last for such heads, which takes most."""
    fitting = [tiling for tiling in tilings if dim <= tiling.dim and planes <= tiling.planes]
    if not fitting:
        raise KVSpliceError(
            f"the triton engine takes heads of up to {tilings[-1].dim} dimensions, not {dim}; use reference"
        )
    fitting = [tiling for tiling in fitting if tiling.dim == fitting[0].dim]
    return next((tiling for tiling in fitting if rows <= tiling.rows), fitting[-1])


@lru_cache
def _splits(programs: int, places: int) -> int:
    """Into how many parts to cut the work of so many programs, of which so many run at once: what is done soonest."""

    def time(splits: int) -> float:
        return _tiles(programs * splits, places) / splits * (1 + SPLIT_COST * splits)

    return min(range(1, MOST_SPLITS + 1), key=time)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def _stages(device: torch.device) -> int:
    """How many tiles of prompts are under way: three where two programs of the largest then share a multiprocessor."""
    if device.type != "cuda":
        return 2
    return 3 if torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 224 << 10 else 2


def _tiles(count: int, size: int) -> int:
    return -(-count // size)


def _power(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, count - 1).bit_length()


def _padded(dim: int) -> int:
    """A head's dimensions as kernels count them: matrix instructions take sixteen."""
    return max(16, _power(dim))


def _prepared(codec: LayerCodec) -> Tables:
    """The kernels' form of `codec`, made once."""
    fields = vars(codec)
    if "_triton" not in fields:
        fields["_triton"] = tables_of(codec)
    return fields["_triton"]

"""The CPU engine beside stock vLLM's CPU attention, in one process and in turns: `make bench-cpu`.

(a) decode attention of one layer, (b) encoding a step's tokens, (c) a chunk of a prompt over its context. Both sides read
several layers one after the other, as a server does, so that neither finds its cache in the processor's. Codes take 3.5
bits, and the newest 32 tokens are read exactly, as served by default. Prints a table and writes build/bench/cpu.json: rows
with `bench`, `case`, `stock`, `ours`, `ratio` (above 1: ours is faster) and `unit`; medians.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from tests.codecs import make_codec
from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines import Batch, Window
from vllm_kvsplice.engines.cpu import CpuEngine

OUT = Path("build/bench/cpu.json")
SHAPES = {"9/3x64": (9, 3, 64), "12/12x64": (12, 12, 64), "32/8x128": (32, 8, 128), "16/2x128": (16, 2, 128)}
DECODE = [(1, 8192), (8, 4096), (16, 1024), (1, 32768)]
CHUNK, CONTEXT = 512, 4096
WIDTHS = (2, 3, 3, 3, 4, 4, 4, 5)
BLOCK, WINDOW, WINDOW_BLOCK = 128, 32, 16
# More than the processor's share of any cache, so that every layer comes from memory.
RESIDENT_BYTES = 400 << 20


@dataclass(frozen=True)
class Load:
    """A step: per sequence `queries` new tokens, the last of `context` stored."""

    shape: str
    sequences: int
    queries: int
    context: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.queries

    @property
    def dims(self) -> tuple[int, int, int]:
        return SHAPES[self.shape]

    @property
    def layers(self) -> int:
        """So many that stock's cache of them fills `RESIDENT_BYTES`."""
        _, heads, dim = self.dims
        return max(2, min(8, RESIDENT_BYTES // (self.sequences * self.context * heads * dim * 4)))

    @cached_property
    def query(self) -> Tensor:
        return torch.randn(self.tokens, self.dims[0], self.dims[2], dtype=torch.bfloat16)

    @cached_property
    def starts(self) -> Tensor:
        return torch.arange(self.sequences + 1, dtype=torch.int32) * self.queries

    @cached_property
    def lengths(self) -> Tensor:
        return torch.full((self.sequences,), self.context, dtype=torch.int32)

    def table(self, block: int) -> Tensor:
        """Every sequence's blocks, scattered."""
        blocks = -(-self.context // block)
        order = torch.randperm(self.sequences * blocks, generator=torch.Generator().manual_seed(0))
        return order.int().view(self.sequences, blocks) + 1

    @property
    def blocks(self) -> int:
        return 1 + self.sequences * -(-self.context // BLOCK)


def stock(load: Load, cache_dtype: str, stock_isa: str | None) -> Callable[[], None]:
    """Stock attention over all layers, called as `CPUAttentionBackendImpl.forward` does; in its own choice of kernels."""
    heads, kv_heads, dim = load.dims
    isa = stock_isa or _get_attn_isa(torch.bfloat16, BLOCK, dim, cache_dtype)
    storage = torch.bfloat16 if cache_dtype == "auto" else torch.uint8
    caches = []
    for _ in range(load.layers):
        raw = torch.zeros(load.blocks, kv_heads, 2 * BLOCK, dim, dtype=storage)
        caches.append(raw.chunk(2, dim=2))
        fill_stock(load, caches[-1], isa, cache_dtype)
    table, output = load.table(BLOCK), torch.empty_like(load.query)
    plan = ops.cpu_attn_get_scheduler_metadata(
        load.sequences, heads, kv_heads, dim, load.lengths, torch.bfloat16, load.starts, True, -1, isa, True,
        kv_cache_dtype=cache_dtype,
    )  # fmt: skip

    def run() -> None:
        for key, value in caches:
            ops.cpu_attention_with_kv_cache(
                load.query, key, value, output, load.starts, load.lengths, dim**-0.5, True, None, -1, table, 0.0,
                plan, None, kv_cache_dtype=cache_dtype,
            )  # fmt: skip

    return run


def fill_stock(load: Load, cache: tuple[Tensor, Tensor], isa: str, cache_dtype: str) -> None:
    _, kv_heads, dim = load.dims
    for first in range(BLOCK, load.blocks * BLOCK, 16 * BLOCK):
        slots = torch.arange(first, min(first + 16 * BLOCK, load.blocks * BLOCK))
        tokens = torch.randn(2, len(slots), kv_heads, dim, dtype=torch.bfloat16)
        ops.cpu_attn_reshape_and_cache(*tokens, *cache, slots, isa, kv_cache_dtype=cache_dtype)


def our_layers(load: Load) -> list[tuple[LayerCodec, Tensor]]:
    """Every layer's own codec and pages."""
    _, kv_heads, dim = load.dims
    codecs = [make_codec(kv_heads, dim, widths=WIDTHS, seed=layer, falling=True) for layer in range(load.layers)]
    shape = (load.blocks, codecs[0].layout.token_bytes, BLOCK)
    return [(codec, torch.randint(256, shape, dtype=torch.uint8)) for codec in codecs]


def ours(load: Load, engine: CpuEngine) -> Callable[[], None]:
    """The same over packed pages and an exact window."""
    _, kv_heads, dim = load.dims
    raw_table = load.table(WINDOW_BLOCK)
    raw_shape = (int(raw_table.max()) + 1, kv_heads, WINDOW_BLOCK, 2 * dim)
    layers = [
        (codec, pages, Window(WINDOW, torch.randn(raw_shape).bfloat16(), raw_table))
        for codec, pages in our_layers(load)
    ]
    batch, output = Batch(load.starts, load.lengths, load.table(BLOCK)), torch.empty_like(load.query)

    def run() -> None:
        for codec, pages, window in layers:
            engine.attend(codec, load.query, pages, batch, dim**-0.5, window, output)

    return run


def encoding(load: Load, engine: CpuEngine) -> Callable[[], None]:
    """Writing one decode step's tokens of every layer."""
    _, kv_heads, dim = load.dims
    layers = our_layers(load)
    key, value = torch.randn(2, load.tokens, kv_heads, dim, dtype=torch.bfloat16)
    positions = torch.full((load.tokens,), load.context - 1)
    slots = torch.arange(load.tokens) * (load.context // BLOCK) * BLOCK + BLOCK

    def run() -> None:
        for codec, pages in layers:
            engine.write(codec, key, value, positions, slots, pages)

    return run


def medians(runs: list[Callable[[], None]], layers: int, seconds: float) -> list[float]:
    """Milliseconds a layer of each, taken in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    until = perf_counter() + seconds
    while perf_counter() < until or len(times[0]) < 5:
        for run, taken in zip(runs, times, strict=True):
            start = perf_counter()
            run()
            taken.append((perf_counter() - start) * 1e3 / layers)
    return [median(taken) for taken in times]


def row(bench: str, case: str, stock_ms: float, ours_ms: float) -> dict[str, object]:
    found = {
        "bench": bench,
        "case": case,
        "stock": stock_ms,
        "ours": ours_ms,
        "ratio": stock_ms / ours_ms,
        "unit": "ms",
    }
    print(f"{bench:8} {case:32} {stock_ms:9.3f} {ours_ms:9.3f} {stock_ms / ours_ms:7.2f}", flush=True)
    return found


def compare(bench: str, load: Load, seconds: float, no_amx: bool) -> list[dict[str, object]]:
    """Rows against stock bf16 and fp8."""
    engine, stock_isa = CpuEngine("avx512" if no_amx else None), "vec" if no_amx else None
    where = f"{load.shape} {load.sequences}x{load.context}"
    bf16, fp8, own = medians(
        [stock(load, "auto", stock_isa), stock(load, "fp8", stock_isa), ours(load, engine)], load.layers, seconds
    )
    rows = [row(bench, f"{where} bf16", bf16, own), row(bench, f"{where} fp8", fp8, own)]
    if bench == "decode":
        # Here `stock` is the decode step of our own engine: the row says how many times over it could encode.
        (encode,) = medians([encoding(load, engine)], load.layers, seconds / 4)
        rows.append(row("encode", f"{where} of a decode step", own, encode))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measurement a case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-amx", action="store_true", help="both sides as on processors with AVX-512 alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Threads inherit the permission to use AMX tiles, which stock takes where the processor has them.
    torch.cpu._init_amx()
    loads = [("decode", Load(shape, n, 1, context)) for shape in SHAPES for n, context in DECODE]
    loads += [("prefill", Load(shape, 1, CHUNK, CONTEXT + CHUNK)) for shape in SHAPES]
    print(f"{'bench':8} {'case':32} {'stock':>9} {'ours':>9} {'ratio':>7}")
    rows = []
    for bench, load in loads:
        if options.only in f"{bench} {load.shape} {load.sequences}x{load.context}":
            rows += compare(bench, load, options.seconds, options.no_amx)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

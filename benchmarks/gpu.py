"""Decode attention of the GPU engine on this machine's GPU, beside dense attention; needs nothing but torch and Triton.

    python -m benchmarks.gpu [--only '32/8x128 16x32768'] [--minutes 9] [--prompts]

First the kernels are checked against the reference engine; a wrong answer ends the program. Then, per shape, batch, context
and bits: microseconds of one layer's decode step in a CUDA graph, compressed bytes per second and their share of a measured
copy, the same step by `scaled_dot_product_attention` in bfloat16 and by a dense Triton kernel of the same structure over
8-bit floats, and the microseconds of encoding the step's tokens. Several layers are read in turn, so that none is found in
the L2 cache. Rows are appended to benchmarks/results/gpu.csv; ratios above 1 mean that ours is faster. With `--prompts` a
chunk of one prompt is attended to instead; rows go to benchmarks/results/gpu_prompts.csv.
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu_dense import dense_decode
from tests.codecs import make_codec
from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines import Batch, Window, reference
from vllm_kvsplice.engines.triton import TritonEngine

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
PROMPT_RESULTS = RESULTS.with_name("gpu_prompts.csv")
SHAPES = {"32/8x128": (32, 8, 128), "64/8x128": (64, 8, 128)}
# Of the groups, by bits per element.
WIDTHS = {2.5: (1, 2, 2, 2, 3, 3, 3, 4), 3.0: (1, 2, 3, 3, 3, 4, 4, 4), 4.0: (2, 3, 4, 4, 4, 5, 5, 5)}
BATCHES, CONTEXTS, TARGET = (1, 4, 16, 64), (4096, 32768, 131072), (16, 32768)
# Of prompts: the step's tokens, and tokens stored with them.
CHUNKS = ((2048, 32768), (8192, 32768), (8192, 8192), (2048, 2048), (512, 4096), (2048, 131072))
BLOCK, WINDOW, WINDOW_BLOCK = 64, 32, 16
# Read in turn by one measurement: several times what an L2 cache holds.
RESIDENT_BYTES, MOST_LAYERS = 1 << 30, 16
DENSE_SPLITS = 16
# Off the reference by, relative to the largest output; queries and probabilities have float16's 11 bits.
LIMIT = 2e-3


@dataclass(frozen=True)
class Load:
    """A step: `chunk` tokens for each of `batch` sequences of `context` tokens."""

    shape: str
    batch: int
    context: int
    bits: float
    uniform: bool = True
    chunk: int = 1

    @property
    def name(self) -> str:
        levels = "" if self.uniform else ", any levels"
        chunk = "" if self.chunk == 1 else f", {self.chunk} tokens"
        return f"{self.shape} {self.batch}x{self.context} {self.bits} bits{levels}{chunk}"

    @property
    def heads(self) -> tuple[int, int, int]:
        return SHAPES[self.shape]

    @property
    def dense_bytes(self) -> int:
        """Of a layer's keys and values in bfloat16."""
        return self.batch * self.context * self.heads[1] * self.heads[2] * 4

    @property
    def code_bytes(self) -> float:
        return self.dense_bytes / 16 * self.bits


@dataclass(frozen=True)
class Layer:
    """Random pages, any bytes being codes, and what a step needs to attend to them."""

    codec: LayerCodec
    query: Tensor
    pages: list[Tensor]
    batch: Batch
    window: Window

    @classmethod
    def of(cls, load: Load, device: torch.device, layers: int) -> "Layer":
        (heads, kv_heads, dim), batch = load.heads, load.batch
        codec = make_codec(kv_heads, dim, WIDTHS[load.bits], uniform=load.uniform).to(device)

        def table(block: int) -> Tensor:
            blocks = -(-load.context // block)
            return (torch.randperm(batch * blocks, device=device) + 1).int().view(batch, blocks)

        shape = batch * (load.context // BLOCK) + 1, codec.layout.token_bytes, BLOCK
        pages = [torch.randint(256, shape, dtype=torch.uint8, device=device) for _ in range(layers)]
        lengths = torch.full((batch,), load.context, dtype=torch.int32, device=device)
        start = torch.arange(batch + 1, dtype=torch.int32, device=device) * load.chunk
        raw_blocks = batch * 3 if load.chunk == 1 else load.context // WINDOW_BLOCK
        raw = torch.randn(raw_blocks + 1, kv_heads, WINDOW_BLOCK, 2 * dim, dtype=torch.bfloat16, device=device)
        # The window's table names blocks of its last tokens only; the others are never read.
        near = table(WINDOW_BLOCK) % len(raw)
        query = torch.randn(batch * load.chunk, heads, dim, dtype=torch.bfloat16, device=device)
        step = Batch(start, lengths, table(BLOCK), load.context)
        return cls(codec, query, pages, step, Window(WINDOW, raw, near))

    def attend(self, engine: TritonEngine, pages: Tensor) -> Tensor:
        return engine.attend(self.codec, self.query, pages, self.batch, self.query.shape[2] ** -0.5, self.window)


def check(device: torch.device, context: int = 960) -> None:
    """Compare bytes and attention with the reference, and dense decoding with torch's."""
    engine = TritonEngine()
    for bits, uniform, chunk in product(WIDTHS, (True, False), (1, 100)):
        load = Load("32/8x128", 2, context, bits, uniform, chunk)
        layer = Layer.of(load, device, 1)
        off = difference(layer.attend(engine, layer.pages[0]), layer.attend(reference, layer.pages[0]))
        written = [torch.zeros_like(layer.pages[0]) for _ in range(2)]
        key, value = torch.randn(2, 40, *load.heads[1:], device=device).bfloat16()
        slots = torch.randperm(written[0].shape[0] * BLOCK, device=device)[:40]
        for kernels, pages in zip((engine, reference), written, strict=True):
            kernels.write(layer.codec, key, value, torch.arange(40, device=device) * 999, slots, pages)
        wrong = int((written[0] != written[1]).sum())
        levels = "uniform" if uniform else "other"
        print(f"check: {bits} bits, {levels} levels, {chunk} tokens: attention off by {off:.1e}, {wrong} bytes differ")
        if off > LIMIT or wrong:
            sys.exit("the kernels are wrong on this GPU; nothing was measured")
    query = torch.randn(2, 8, 64, device=device).bfloat16()
    keys, values = (torch.randn(2, 2, context, 64, device=device).to(eight_bits(device)) for _ in range(2))
    wide = [x.float().repeat_interleave(4, 1) for x in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(query.float()[:, :, None], *wide)[:, :, 0]
    if difference(dense_decode(query, keys, values, 64**-0.5, 3), expected) > LIMIT:
        sys.exit("the dense kernel is wrong on this GPU; nothing was measured")


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def eight_bits(device: torch.device) -> torch.dtype:
    """A float type of eight bits whose conversion the GPU has: e4m3 from sm_89 on."""
    new = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return torch.float8_e4m3fn if new else torch.float8_e5m2


def microseconds(run: Callable[[], object], seconds: float = 0.3) -> float:
    """Median time of a call, from a CUDA graph so that no launch is waited for."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    until = perf_counter() + seconds
    while perf_counter() < until or len(times) < 5:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return median(times)


def copy_speed(device: torch.device) -> float:
    """Bytes per second read and written by a large copy."""
    source = torch.randint(1 << 62, (RESIDENT_BYTES // 8,), dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    # As a kernel: `copy_` runs at two thirds of its speed inside a graph (seen on an H200).
    return 2 * RESIDENT_BYTES / microseconds(lambda: torch.bitwise_not(source, out=target)) * 1e6


def ours(load: Load, device: torch.device) -> tuple[float, float]:
    """Microseconds of attention, and of encoding the step's tokens."""
    layers = int(min(MOST_LAYERS, max(2, RESIDENT_BYTES // load.code_bytes)))
    layer, engine = Layer.of(load, device, layers), TritonEngine()
    attention = microseconds(lambda: [layer.attend(engine, pages) for pages in layer.pages]) / layers
    _, kv_heads, dim = load.heads
    key = torch.randn(load.batch, kv_heads, dim, dtype=torch.bfloat16, device=device)
    positions = torch.full((load.batch,), load.context - 1, device=device)
    slots = layer.batch.block_table[:, -1].long() * BLOCK + BLOCK - 1
    raw_slots = torch.arange(1, load.batch + 1, device=device) * WINDOW_BLOCK

    def encode() -> None:
        for pages in layer.pages:
            engine.write(layer.codec, key, key, positions, slots, pages)
            engine.write_window(key, key, raw_slots, layer.window.pages)

    return attention, microseconds(encode) / layers


def dense_prompt(load: Load, device: torch.device) -> float:
    """Microseconds of torch's attention of a chunk of one prompt in bfloat16."""
    heads, _, dim = load.heads
    query = torch.randn(1, heads, load.chunk, dim, dtype=torch.bfloat16, device=device)
    keys, values = torch.randn(2, 1, heads, load.context, dim, dtype=torch.bfloat16, device=device)
    mask = causal_lower_right(load.chunk, load.context)
    return microseconds(lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask))


def dense(load: Load, device: torch.device, dtype: torch.dtype) -> float:
    """Microseconds of dense attention: torch's in bfloat16, the Triton kernel's in eight bits."""
    heads, kv_heads, dim = load.heads
    layers = int(min(MOST_LAYERS, max(1, RESIDENT_BYTES // load.dense_bytes)))
    query = torch.randn(load.batch, heads, 1, dim, dtype=torch.bfloat16, device=device)
    shape = load.batch, kv_heads, load.context, dim
    caches = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)] for _ in range(layers)]

    def run() -> None:
        for keys, values in caches:
            if dtype == torch.bfloat16:
                torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            else:
                dense_decode(query[:, :, 0], keys, values, dim**-0.5, DENSE_SPLITS)

    return microseconds(run) / layers


def loads(only: str) -> list[Load]:
    """Those with `only` in their name; what the targets are set for first, because time may run out.

    With evenly spaced levels, and once for each shape with others, which have a kernel of their own.
    """
    found = [Load(*each) for each in product(SHAPES, BATCHES, CONTEXTS, WIDTHS)]
    found += [Load(shape, *TARGET, 3.0, uniform=False) for shape in SHAPES]
    return sorted((load for load in found if only in load.name), key=lambda load: (load.batch, load.context) != TARGET)


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, object]:
    """Where a row was measured, and of what."""
    about = {"gpu": torch.cuda.get_device_name(), "commit": commit()}
    return about | {"torch": torch.__version__, "triton": triton.__version__}


def measure_prompts(only: str, seconds: float) -> Iterator[dict[str, object]]:
    """A row for each chunk, with evenly spaced levels and with others."""
    device, until = torch.device("cuda"), perf_counter() + seconds
    for shape, (chunk, context), uniform in product(SHAPES, CHUNKS, (True, False)):
        load = Load(shape, 1, context, 3.0, uniform, chunk)
        if only not in load.name or perf_counter() > until:
            continue
        layer = Layer.of(load, device, 1)
        step = microseconds(partial(layer.attend, TritonEngine(), layer.pages[0]))
        bf16 = dense_prompt(load, device)
        row = {"shape": shape, "chunk": chunk, "context": context, "bits": load.bits}
        row |= {"levels": "uniform" if uniform else "any", "us": f"{step:.1f}"}
        yield machine() | row | {"sdpa_bf16_us": f"{bf16:.1f}", "bf16_ratio": f"{bf16 / step:.2f}"}


def measure(only: str, seconds: float) -> Iterator[dict[str, object]]:
    """A row for each load that fits the GPU, until the time is over."""
    device, until = torch.device("cuda"), perf_counter() + seconds
    memory = torch.cuda.get_device_properties(device).total_memory
    speed = copy_speed(device)
    about = machine() | {"copy_GB_s": f"{speed / 1e9:.0f}"}
    known: dict[tuple[str, int, int], tuple[float, float]] = {}
    for load in loads(only):
        if perf_counter() > until:
            print("The time is over; the rest was not measured.")
            return
        if 1.5 * load.dense_bytes > memory:
            continue
        step, encode = ours(load, device)
        place = load.shape, load.batch, load.context
        known[place] = known.get(place) or (
            dense(load, device, torch.bfloat16),
            dense(load, device, eight_bits(device)),
        )
        bf16, fp8 = known[place]
        rate = load.code_bytes / step * 1e6
        row = {"shape": load.shape, "batch": load.batch, "context": load.context, "bits": load.bits}
        row |= {"levels": "uniform" if load.uniform else "any"}
        row |= {"us": f"{step:.1f}", "GB_s": f"{rate / 1e9:.0f}", "of_copy": f"{rate / speed:.3f}"}
        row |= {"sdpa_bf16_us": f"{bf16:.1f}", "bf16_ratio": f"{bf16 / step:.2f}"}
        row |= {"fp8_us": f"{fp8:.1f}", "fp8_ratio": f"{fp8 / step:.2f}", "encode_us": f"{encode:.1f}"}
        yield about | row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a load's name, such as '32/8x128 16x32768 3.0 bits'")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no new measurement begins")
    parser.add_argument("--prompts", action="store_true", help="measure prompts instead of decoding")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; run this on a machine with one")
    check(torch.device("cuda"))
    what, results = (measure_prompts, PROMPT_RESULTS) if options.prompts else (measure, RESULTS)
    for row in what(options.only, options.minutes * 60):
        append(results, row)
        print(*(f"{name}={value}" for name, value in row.items() if name not in ("gpu", "commit")), flush=True)


def append(file: Path, row: dict[str, object]) -> None:
    """Add a row to a CSV file, with a header where there is none; ends the program where there is another."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", newline="") as out:
        out.seek(0)
        header = next(csv.reader(out), None)
        if header not in (None, list(row)):
            sys.exit(f"{file} has other columns than {', '.join(row)}; move it away")
        writer = csv.DictWriter(out, list(row))
        if header is None:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()

"""Compile the GPU engine's kernels as it would launch them, on any machine, and count what came out.

    python -m benchmarks.gpu_variants [--corners] [--json]
    python -m benchmarks.gpu_variants --unrehearsed

One row for each variant and target: registers, spilled bytes and shared memory as ptxas reports them, and for attention the
instructions that a lane issues in the loop over stored tokens, for each latent of a token; `local` are those that read or
write spilled values. `--unrehearsed` names instead what a server would compile while requests wait. Needs no GPU.
"""

import argparse
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from tests.codecs import make_codec
from vllm_kvsplice.engines import Batch, Window
from vllm_kvsplice.engines.triton import TritonEngine
from vllm_kvsplice.engines.triton.kernels import attention, encode, prompt

TARGETS = {"sm_80": 80, "sm_90": 90}
PRODUCTS = ("HMMA", "HGMMA", "IMMA", "IGMMA")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
KERNELS = {
    **dict.fromkeys(("encode_kernel", "copy_kernel"), encode),
    **dict.fromkeys(("absorb_kernel", "attend_kernel", "finish_kernel"), attention),
    **dict.fromkeys(("rebuild_kernel", "prompt_kernel"), prompt),
}
# Of a sequence in any variant here.
MOST_QUERIES = 64
# Widths whose codes have one, two and three planes.
PLANES = {1: (2, 4), 2: (2, 3, 4, 5), 3: (2, 3, 7)}


@dataclass(frozen=True)
class Variant:
    """A step that makes the engine launch certain variants: `queries` tokens of each sequence."""

    dim: int
    group: int
    queries: int = 1
    planes: int = 2
    uniform: bool = False
    block: int = 64
    window: int = 32
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        window = f"window of {str(self.dtype)[6:]}" if self.window else "no window"
        levels = f"{self.planes} planes{', uniform' if self.uniform else ''}"
        return f"{self.group} x {self.dim}, {self.queries} queries, {levels}, blocks of {self.block}, {window}"


# Those of the commonest heads that need most registers.
CORNERS = [
    Variant(128, 4, queries, planes, uniform)
    for queries, planes, uniform in ((9, 3, False), (9, 2, True), (1, 2, True), (64, 3, False))
]
ALL = [
    Variant(dim, group, queries, planes, uniform)
    for uniform in (True, False)
    for dim in (64, 128, 256)
    for planes in PLANES
    for group, queries in ((4, 1), (16, 1), (8, 9))
] + [
    *(Variant(dim, 4, 9, block=block) for dim in (32, 64, 80, 96, 128) for block in (16, 32)),
    *(Variant(dim, 4, queries, window=0) for dim in (64, 128, 256) for queries in (1, 9)),
    *(Variant(dim, 4, 64, planes=3, window=window) for dim in (64, 128, 256) for window in (0, 32)),
    *(Variant(dim, 16, 9, planes=3, dtype=dtype) for dim in (64, 128, 256) for dtype in (torch.float16, torch.float32)),
]


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in self.constants.items() if name not in self.kernel.arg_names}

    def key(self) -> tuple[str, ...]:
        """The same for launches that share what is compiled."""
        return self.name, self.source().hash(), str(sorted(self.options.items()))

    def source(self) -> ASTSource:
        """What Triton would compile for this launch."""
        names, values = self.kernel.arg_names, [*self.arguments]
        values += [self.constants[name] for name in names[len(values) :]]
        given = len(self.arguments)
        types = [kind(value) if i < given else "constexpr" for i, value in enumerate(values)]
        constants = {(i,): values[i] for i, name in enumerate(types) if name == "constexpr"}
        free = {i for i, p in enumerate(self.kernel.params) if p.do_not_specialize or p.do_not_specialize_on_alignment}
        aligned = {
            path: [["tt.divisibility", 16]]
            for i in range(given)
            if i not in free
            for path in divisible(values[i], (i,))
        }
        return ASTSource(self.kernel, dict(zip(names, types, strict=True)), constants, aligned)


def kind(value: Any) -> Any:
    """Triton's name of a launched value's type."""
    if isinstance(value, tuple):
        return type(value)(*map(kind, value))
    return "constexpr" if value is None else mangle_type(value)


def divisible(value: Any, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Where in an argument there are pointers and integers that sixteen divides."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from divisible(part, (*path, i))
    elif (type(value) is int and value % 16 == 0) or (isinstance(value, Tensor) and value.data_ptr() % 16 == 0):
        yield path


class Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, name: str, kernel: Any, launches: list[Launch]) -> None:
        self._name, self._kernel, self._launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self._launches.append(
            Launch(self._name.removesuffix("_kernel"), self._kernel, arguments, constants)
        )


def launches(work: Callable[[], None]) -> list[Launch]:
    """What the engine launches for it."""
    found: list[Launch] = []
    with ExitStack() as stack:
        for name, module in KERNELS.items():
            stack.enter_context(patch.object(module, name, Recorder(name, getattr(module, name), found)))
        work()
    return found


class Layer:
    """One of a model with two KV heads, and two sequences."""

    def __init__(self, variant: Variant) -> None:
        heads, dim, dtype = 2, variant.dim, variant.dtype
        self.variant, self.engine = variant, TritonEngine()
        self.codec = make_codec(heads, dim, PLANES[variant.planes], uniform=variant.uniform)
        self.query = torch.zeros(2 * MOST_QUERIES, heads * variant.group, dim, dtype=dtype)
        self.key = torch.zeros(2 * MOST_QUERIES, heads, dim, dtype=dtype)
        self.pages = torch.zeros(4, self.codec.layout.token_bytes, variant.block, dtype=torch.uint8)
        self.table = torch.zeros(2, 17, dtype=torch.int32)
        raw = torch.zeros(4, heads, 16, 2 * dim, dtype=dtype)
        self.window = Window(variant.window, raw, self.table) if variant.window else None

    def step(self, first: int = 0) -> None:
        """Of the sequences from `first` on, each with as many tokens as the variant says."""
        start, lengths = torch.arange(3, dtype=torch.int32), torch.full((2,), 64, dtype=torch.int32)
        batch = Batch((start * self.variant.queries)[first:], lengths[first:], self.table[first:])
        window = replace(self.window, block_table=batch.block_table) if self.window else None
        tokens = len(batch.seq_lens) * self.variant.queries
        key, query, slots = self.key[:tokens], self.query[:tokens], torch.arange(tokens)
        self.engine.write(self.codec, key, key, slots, slots, self.pages)
        if window:
            self.engine.write_window(key, key, slots, window.pages)
        self.engine.attend(self.codec, query, self.pages, batch, 0.1, window, torch.empty_like(query))

    def rehearse(self) -> None:
        self.engine.rehearse(self.codec, self.query, self.key, self.key, self.variant.block, self.window)


def unrehearsed() -> set[str]:
    """Kernels of which steps launch variants that `TritonEngine.rehearse` does not."""
    found = set()
    for variant in (Variant(128, 4, uniform=True), Variant(64, 3, planes=3), Variant(256, 8, window=0)):
        rehearsed = {launch.key() for launch in launches(Layer(variant).rehearse)}
        for queries in (1, 2, 5, 12, 13, MOST_QUERIES):
            layer = Layer(replace(variant, queries=queries))
            for first in (0, 1):
                made = launches(partial(layer.step, first))
                found |= {f"{launch.name} of {layer.variant}" for launch in made if launch.key() not in rehearsed}
    return found


def compiled(launch: Launch, target: str) -> dict[str, Any]:
    """A row of figures."""
    log = io.StringIO()
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    with redirect_stdout(log):
        made = triton.compile(launch.source(), target=GPUTarget("cuda", TARGETS[target], 32), options=launch.options)
    said = log.getvalue()
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    row = {"kernel": launch.name, "target": target, "registers": registers, "spilled_bytes": spilled}
    row |= {"shared_bytes": made.metadata.shared, "warps": made.metadata.num_warps}
    if launch.name == "attend":
        rows, tile, dim = (launch.constants[name] for name in ("ROWS", "TILE", "D"))
        each = 2 * dim * tile / (32 * made.metadata.num_warps)
        counts = {name: round(count / each, 2) for name, count in loop(disassembled(made.asm["cubin"])).items()}
        counts["local"] = counts.get("LDL", 0) + counts.get("STL", 0)
        row |= {"rows": rows, "tile": tile, "uniform": launch.constants["UNIFORM"], "per_latent": counts}
    return row


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def loop(code: str) -> Counter[str]:
    """Instructions by name, and `all`, of the first loop that multiplies matrices: the one over stored tokens."""
    labels: dict[str, int] = {}
    names: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", line):
            names.append(instruction[1])
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            body = names[labels.get(target[1] if target else "", len(names)) :]
            if any(name in PRODUCTS for name in body):
                return Counter({"all": len(body), **Counter(body)})
    raise ValueError("no loop multiplies matrices")


def rows(variants: list[Variant]) -> Iterator[dict[str, Any]]:
    """Each different kernel once."""
    seen = set()
    for variant in variants:
        for launch in launches(Layer(variant).step):
            if launch.key() not in seen:
                seen.add(launch.key())
                yield from ({"variant": str(variant), **compiled(launch, target)} for target in TARGETS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corners", action="store_true", help="only the largest variants for heads of 128")
    parser.add_argument("--json", action="store_true", help="one list instead of a line for each row")
    parser.add_argument("--unrehearsed", action="store_true", help="kernels that no start of a server has compiled")
    options = parser.parse_args()
    if options.unrehearsed:
        print(*sorted(unrehearsed()), sep="\n")
        return
    found = []
    for row in rows(CORNERS if options.corners else ALL):
        found.append(row)
        if not options.json:
            print(row, flush=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

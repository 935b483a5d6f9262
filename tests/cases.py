"""What the tests share: shapes, random codecs, paged memory, second formulations. Letters as in `vllm_kvsplice`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.codecs import ALL_WIDTHS, ROTARIES, SINKS, make_codec
from vllm_kvsplice.artifact import Artifact, LayerPlan, Manifest, ModelShape, Provenance, RotaryShape
from vllm_kvsplice.codec import LOWEST_LEVEL, KindCodec, LayerCodec
from vllm_kvsplice.engines import Batch, Engine, Window
from vllm_kvsplice.layout import GROUP, LayerLayout

CANARY = 0xA5
# Eight latents whose low bits are the codes at every width, and their bytes at each width, worked out by hand.
GOLDEN_LATENTS = (0x1B, 0x2D, 0xC6, 0x93, 0x58, 0xE4, 0x7F, 0xA0)
GOLDEN = {
    0: "",
    1: "4B",
    2: "E7 30",
    3: "E7 30 66",
    4: "DB 36 48 0F",
    5: "DB 36 48 0F 59",
    6: "DB 36 48 0F 49 B9",
    7: "DB 36 48 0F 49 B9 74",
    8: "1B 2D C6 93 58 E4 7F A0",
}


def span(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}..{numbers[-1]}"


@dataclass(frozen=True)
class Case:
    """One step: per sequence (T queries, S stored tokens, theirs included), heads, and pages of N tokens a block."""

    sequences: tuple[tuple[int, int], ...] = ((7, 33),)
    heads: int = 2
    group: int = 3
    dim: int = 32
    block: int = 16
    widths: tuple[int, ...] = ALL_WIDTHS
    rotary: str = "half"
    sinks: str = "mixed"
    seed: int = 0
    # Whether levels are evenly spaced.
    uniform: bool = False
    # Of the exact window: its tokens, the tokens a block of it holds, and whether a step reads all its own exactly.
    window: int = 0
    window_block: int = 8
    whole_chunk: bool = False
    # Of queries, keys, values and the exact window.
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        queries, stored = (span(numbers) for numbers in zip(*self.sequences, strict=True))
        widths = span(self.widths) + ("-uniform" if self.uniform else "")
        shape = f"T{queries}-S{stored}-H{self.heads}-G{self.group}-D{self.dim}-N{self.block}-w{widths}"
        window = f"-W{self.window}x{self.window_block}{'-chunk' if self.whole_chunk else ''}" if self.window else ""
        dtype = "" if self.dtype == torch.float32 else f"-{str(self.dtype).removeprefix('torch.')}"
        return f"{shape}-{self.rotary}-{self.sinks}{window}{dtype}" + (f"-seed{self.seed}" if self.seed else "")

    @property
    def codec_id(self) -> str:
        return f"H{self.heads}-D{self.dim}-w{span(self.widths)}-{self.rotary}-{self.sinks}"

    def codec(self) -> LayerCodec:
        return make_codec(self.heads, self.dim, self.widths, self.rotary, self.sinks, self.seed, self.uniform)


# Decode, fresh prompt, continuation, a full block and a single token, as one vLLM step mixes them.
MIXED = ((1, 40), (19, 19), (7, 33), (1, 16), (1, 1), (16, 48), (1, 17))


def random_case(seed: int) -> Case:
    """A small case of any shape."""
    random = torch.Generator().manual_seed(seed)

    def pick(options: Sequence) -> object:
        return options[int(torch.randint(len(options), (1,), generator=random))]

    stored = [pick(range(1, 50)) for _ in range(pick((1, 2, 3)))]
    return Case(
        sequences=tuple((pick(range(1, min(n, 9) + 1)), n) for n in stored),
        heads=pick((1, 2, 3)),
        group=pick((1, 3)),
        dim=pick((8, 32, 64)),
        block=pick((16, 32)),
        widths=pick((ALL_WIDTHS, (0, 1), (3, 5, 7), (8,))),
        rotary=pick(list(ROTARIES)),
        sinks=pick(list(SINKS)),
        seed=seed,
        window=pick((0, 1, 5, 16, 100)),
        window_block=pick((1, 3, 8, 16)),
        whole_chunk=pick((False, True)),
    )


def make_identity_codec(key_widths: Sequence[int], value_widths: Sequence[int]) -> LayerCodec:
    """One head whose latents are its dimensions, which count from -128: 3.0 is stored as 3."""
    dim = GROUP * len(key_widths)
    eye, zero, start = torch.eye(dim)[None], torch.zeros(1, dim), torch.full((1, dim), -float(LOWEST_LEVEL))
    levels = [
        torch.arange(256.0).minimum((1 << torch.tensor(w)[None, :, None]) - 1) + LOWEST_LEVEL
        for w in (key_widths, value_widths)
    ]
    kinds = [KindCodec(start, eye, eye, level, zero, torch.ones(1, dim)) for level in levels]
    return LayerCodec(*kinds, LayerLayout((tuple(key_widths),), (tuple(value_widths),)), None)


def make_tokens(codec: LayerCodec, count: int, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [T, H, D] around the codec's means, and their positions."""
    random = torch.Generator().manual_seed(seed)
    positions = torch.arange(first, first + count)
    noise = torch.randn(2, count, codec.num_kv_heads, codec.head_dim, generator=random)
    return codec.offset("key", positions) + noise[0], codec.offset("value", positions) + noise[1], positions


def make_artifact(codec: LayerCodec, group: int) -> Artifact:
    """An artifact of one layer in memory, not checked."""
    heads, dim, rotary = codec.num_kv_heads, codec.head_dim, codec.rotary
    tensors = {"rotary.inv_freq": rotary.inv_freq} if rotary else {}
    for kind in ("key", "value"):
        half = getattr(codec, kind)
        widths = [w for head in getattr(codec.layout, kind) for w in head]
        parts = [row[: 1 << w] for row, w in zip(half.levels.flatten(0, 1), widths, strict=True) if w]
        fields = {name: tensor[None] for name, tensor in vars(half).items()} | {"levels": torch.cat(parts)}
        tensors |= {f"{kind}.{name}": tensor for name, tensor in fields.items()}
    shape = ModelShape(
        model_type="llama",
        num_layers=1,
        num_heads=heads * group,
        num_kv_heads=heads,
        head_dim=dim,
        hidden_size=heads * group * dim,
        vocab_size=17,
        rope="null",
    )
    words = dict.fromkeys(("model", "text", "text_sha256", "fit", "planner", "requested", "created"), "-")
    manifest = Manifest(
        model=shape,
        rotary=RotaryShape(pairs=len(rotary.inv_freq), interleaved=rotary.interleaved) if rotary else None,
        layers=(LayerPlan(key=codec.layout.key, value=codec.layout.value),),
        provenance=Provenance(**words, expected_change_percent=0.0, tokens=1, context=1, seed=0, versions={}),
        quality=None,
        tensors_sha256="0" * 64,
    )
    return Artifact(manifest, tensors, digest="0" * 64)


@dataclass(frozen=True)
class Request:
    """One sequence: query [T, H * G, D] of its last tokens, key and value [S, H, D] of all, and the blocks it owns.

    Blocks of the exact window are those of all its tokens; what has slid out of it belongs to others by now.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: Tensor
    window_blocks: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        return torch.arange(len(self.key))

    def slots(self, block_size: int) -> Tensor:
        return self.blocks[self.positions // block_size] * block_size + self.positions % block_size

    def window_slots(self, size: int, block_size: int) -> Tensor:
        """Of the tokens that the exact window must hold, the others' -1 (as padding)."""
        assert self.window_blocks is not None
        slots = self.window_blocks[self.positions // block_size] * block_size + self.positions % block_size
        return torch.where(self.positions > len(self.key) - len(self.query) - size, slots, -1)

    def restored_for(self, codec: LayerCodec, window: int, whole_chunk: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values as each query reads them, one query after the other: stored, then the exact ones."""
        stored = codec.reconstruct(self.key, self.value, self.positions)
        first = len(self.key) - len(self.query)
        for last in range(first, len(self.key)):
            begin = max(0, min(last - window + 1, first) if whole_chunk and window else last - window + 1)
            yield tuple(
                torch.cat((old[:begin], new[begin : last + 1]))
                for old, new in zip(stored, (self.key, self.value), strict=True)
            )


@dataclass(frozen=True)
class Step:
    """A step of several sequences over one paged memory, uint8 [B, C, N]."""

    codec: LayerCodec
    requests: list[Request]
    pages: Tensor
    scale: float = 0.125
    window_size: int = 0
    window_pages: Tensor | None = None
    whole_chunk: bool = False

    @property
    def query(self) -> Tensor:
        return torch.cat([r.query for r in self.requests])

    @property
    def batch(self) -> Batch:
        counts = torch.tensor([0, *(len(r.query) for r in self.requests)])
        lengths = torch.tensor([len(r.key) for r in self.requests])
        return Batch(counts.cumsum(0).int(), lengths.int(), table([r.blocks for r in self.requests]))

    @property
    def window(self) -> Window | None:
        """With stale entries also where blocks have slid out of the window."""
        if self.window_pages is None:
            return None
        block_size = self.window_pages.shape[2]
        blocks = []
        for r in self.requests:
            slid_out = max(0, len(r.key) - len(r.query) - self.window_size + 1) // block_size
            blocks.append(torch.where(torch.arange(len(r.window_blocks)) < slid_out, 1, r.window_blocks))
        return Window(self.window_size, self.window_pages, table(blocks), self.whole_chunk)

    @property
    def slots(self) -> Tensor:
        return torch.cat([r.slots(self.pages.shape[2]) for r in self.requests])

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of all that is stored, as `LayerCodec.encode` takes them."""
        return tuple(torch.cat([getattr(r, name) for r in self.requests]) for name in ("key", "value", "positions"))

    def pick(self, order: Sequence[int]) -> "Step":
        return replace(self, requests=[self.requests[i] for i in order])

    def unread(self) -> Tensor:
        """bool [B, N]: the slots that no query reads: of no sequence, or exact for every query."""
        unread = torch.ones(self.pages.shape[0] * self.pages.shape[2], dtype=torch.bool)
        for r in self.requests:
            exact = max(self.window_size, len(r.query) if self.whole_chunk and self.window_size else 0)
            unread[r.slots(self.pages.shape[2])[: max(0, len(r.key) - exact)]] = False
        return unread.view(-1, self.pages.shape[2])

    @property
    def window_slots(self) -> Tensor:
        return torch.cat([r.window_slots(self.window_size, self.window_pages.shape[2]) for r in self.requests])

    def store(self, engine: Engine) -> "Step":
        key, value, positions = self.tokens
        engine.write(self.codec, key, value, positions, self.slots, self.pages)
        if self.window_pages is not None:
            engine.write_window(key, value, self.window_slots, self.window_pages)
        return self

    def attend(self, engine: Engine) -> Tensor:
        return engine.attend(self.codec, self.query, self.pages, self.batch, self.scale, self.window)

    def oracle(self) -> Tensor:
        """What `attend` must return, in float64."""
        outputs = []
        for r in self.requests:
            read = r.restored_for(self.codec, self.window_size, self.whole_chunk)
            outputs += [dense_attention(q[None], *kv, self.scale) for q, kv in zip(r.query, read, strict=True)]
        return torch.cat(outputs)


def with_tensors(step: Step, change: Callable[[Tensor], Tensor]) -> Step:
    """The same step with every query, key and value changed, and pages of its own."""
    requests = [
        replace(r, **{name: change(getattr(r, name)) for name in ("query", "key", "value")}) for r in step.requests
    ]
    return replace(step, requests=requests, pages=step.pages.clone())


def make_step(case: Case, codec: LayerCodec | None = None) -> Step:
    """Random tokens in randomly placed blocks; 0 (vLLM's null block), 1 and 2 stay unused and every byte is a canary."""
    codec = codec or case.codec()
    random = torch.Generator().manual_seed(case.seed)
    counts = [-(-stored // case.block) for _, stored in case.sequences]
    shuffled = 3 + torch.randperm(sum(counts), generator=random)
    requests = [
        Request(
            torch.randn(queries, case.heads * case.group, case.dim, generator=random),
            *make_tokens(codec, stored, seed=case.seed + 101 * index)[:2],
            blocks,
        )
        for index, ((queries, stored), blocks) in enumerate(zip(case.sequences, shuffled.split(counts), strict=True))
    ]
    pages = torch.full((3 + sum(counts), codec.layout.token_bytes, case.block), CANARY, dtype=torch.uint8)
    step = with_tensors(Step(codec, requests, pages, scale=case.dim**-0.5), lambda x: x.to(case.dtype))
    return with_window(step, case, random) if case.window else step


def with_window(step: Step, case: Case, random: torch.Generator) -> Step:
    """The same step with pages for the exact window, which hold NaN where nothing was written."""
    counts = [-(-stored // case.window_block) for _, stored in case.sequences]
    shuffled = (3 + torch.randperm(sum(counts), generator=random)).split(counts)
    shape = (3 + sum(counts), case.heads, case.window_block, 2 * case.dim)
    pages = torch.full(shape, torch.nan, dtype=case.dtype)
    requests = [replace(r, window_blocks=blocks) for r, blocks in zip(step.requests, shuffled, strict=True)]
    return replace(step, requests=requests, window_size=case.window, window_pages=pages, whole_chunk=case.whole_chunk)


def table(blocks: Sequence[Tensor]) -> Tensor:
    """Wider than any sequence needs; the rest names a block that none of them owns, as stale entries do in vLLM."""
    rows = torch.full((len(blocks), 2 + max(map(len, blocks))), 1, dtype=torch.int32)
    for row, own in zip(rows, blocks, strict=True):
        row[: len(own)] = own
    return rows


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v in float64, causal; the T queries [T, H * G, D] are the last of the S tokens."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("thd,shd->hts", query.double(), key) * scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
    return torch.einsum("hts,shd->thd", scores.masked_fill(future, -torch.inf).softmax(-1), value)


def nearest_codes(codec: LayerCodec, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Second formulation of `LayerCodec.encode`, float64 and exhaustive: codes [T, R2], and each one's distance [T, R2]."""
    codes, distances = [], []
    for kind, x in (("key", key), ("value", value)):
        half = getattr(codec, kind)
        residual = (x - codec.offset(kind, positions)).double()
        for head, widths in enumerate(getattr(codec.layout, kind)):
            latents = residual[:, head] @ half.analysis[head].double().T
            units = half.sink_scale[head].double()
            at_sink = torch.where(units > 0, latents / units, 0)
            latents = torch.where(positions[:, None] == 0, at_sink, latents)
            for group, width in enumerate(widths):
                z = latents[:, GROUP * group : GROUP * (group + 1), None]
                distance, code = (z - half.levels[head, group, : 1 << width].double()).abs().min(-1)
                codes.append(code)
                distances.append(distance)
    return torch.cat(codes, 1), torch.cat(distances, 1)


def packed_by_hand(layout: LayerLayout, codes: Sequence[int]) -> bytes:
    """Second formulation of a token's bytes: one plane for each binary digit of the width, 8 latents filling its bits."""
    packed, start = b"", 0
    for width in (w for kind in (layout.key, layout.value) for head in kind for w in head):
        group, low = codes[start : start + GROUP], 0
        for bits in (bits for bits in (8, 4, 2, 1) if width & bits):
            fields = [(code >> low) % (1 << bits) for code in group]
            packed += sum(f << (i * bits) for i, f in enumerate(fields)).to_bytes(bits, "little")
            low += bits
        start += GROUP
    return packed.ljust(layout.token_bytes, b"\0")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on `count` threads: one is five times faster on small tensors where other processes compete for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value is asked for: a GPU is waited for then, and no graph can be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket._qualified_op_name not in ("aten::_local_scalar_dense", "aten::nonzero"), func
        return func(*args, **kwargs or {})


def expect(condition: object, promise: str) -> None:
    """Raise an `AssertionError` that no assertion inside the package can be taken for."""
    if not condition:
        raise AssertionError(f"broken promise: {promise}")


def expect_close(actual: Tensor, expected: Tensor, limit: float, promise: str) -> None:
    """Every difference is within `limit` of the largest number: float32 sums round relative to what they sum."""
    error = ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()
    expect(error <= limit, f"{promise} (off by {error:.2e}, limit {limit:.0e})")

"""Each check of `tests.engines.checks` notices an engine with one fault."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.cases import dense_attention
from tests.engines.checks import (
    WINDOWED,
    check_attention,
    check_batching,
    check_chunks,
    check_poison,
    check_ranks,
    check_store,
    check_strided,
    check_window_store,
)
from vllm_kvsplice.artifact import contents
from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines import Batch, Engine, Window, reference

Fault = Callable[[Engine], Engine]


def plant(method: str, change: Callable[..., dict]) -> Fault:
    """A fault: `method` sees the arguments that `change` returns in place of the given ones."""
    names = list(inspect.signature(getattr(reference, method)).parameters)

    def fault(engine: Engine) -> Engine:
        def faulty(*arguments: object) -> object:
            # Shorter where a trailing argument keeps its default.
            given = dict(zip(names, arguments, strict=False))
            return getattr(engine, method)(*(given | change(**given)).values())

        return with_method(engine, method, faulty)

    return fault


def with_method(engine: Engine, name: str, method: Callable) -> Engine:
    kept = ("write", "write_window", "attend", "isa", "oracle_limit", "order_limit")
    methods = {n: getattr(engine, n) for n in kept if hasattr(engine, n)}
    return SimpleNamespace(**methods | {name: method})


def recode(method: str, change: Callable[[LayerCodec], dict]) -> Fault:
    """The fault that `method` works with a codec some of whose fields are others."""
    return plant(method, lambda codec, **_: {"codec": replace(codec, **change(codec))})


def rolled_levels(dim: int) -> Callable[[LayerCodec], dict]:
    return lambda codec: {"key": replace(codec.key, levels=codec.key.levels.roll(1, dim))}


def swapped_widths(codec: LayerCodec) -> dict:
    return {"layout": replace(codec.layout, key=codec.layout.value, value=codec.layout.key)}


def mean_as_sink(codec: LayerCodec) -> dict:
    return {"value": replace(codec.value, sink=codec.value.mean)}


def every_sink_coded(codec: LayerCodec) -> dict:
    return {"key": replace(codec.key, sink_scale=torch.ones_like(codec.key.sink_scale))}


def no_rotary(codec: LayerCodec) -> dict:
    return {"rotary": None}


def no_causal_mask(batch: Batch, **_: object) -> dict:
    counts = batch.query_start.diff()
    start = torch.arange(int(batch.query_start[-1]) + 1, dtype=torch.int32)
    rows = [x.repeat_interleave(counts, 0) for x in (batch.seq_lens, batch.block_table)]
    return {"batch": Batch(start, *rows)}


def in_batch(change: Callable[[Batch], dict]) -> Callable[..., dict]:
    return lambda batch, **_: {"batch": replace(batch, **change(batch))}


def in_window(change: Callable[[Window], dict]) -> Callable[..., dict]:
    return lambda window, **_: {"window": replace(window, **change(window))}


def clear_rest_of_blocks(slots: Tensor, pages: Tensor, **_: object) -> dict:
    pages[slots[slots >= 0] // pages.shape[2]] = 0
    return {}


def raw_keys(engine: Engine) -> Engine:
    """Attends to the dense keys and values that were written, not to the stored ones."""
    raw: dict[int, tuple[Tensor, Tensor]] = {}

    def write(codec, key, value, positions, slots, pages):
        raw.update(zip(slots.tolist(), zip(key, value, strict=True), strict=True))

    def attend(codec, query, pages, batch, scale, window):
        outputs, size, starts = [], pages.shape[2], batch.query_start.tolist()
        for start, end, table, length in zip(starts, starts[1:], batch.block_table, batch.seq_lens, strict=False):
            pairs = [raw[int(table[j // size]) * size + j % size] for j in range(length)]
            key, value = (torch.stack(x) for x in zip(*pairs, strict=True))
            outputs.append(dense_attention(query[start:end], key, value, scale))
        return torch.cat(outputs)

    return SimpleNamespace(write=write, write_window=engine.write_window, attend=attend)


def next_slot(slots: Tensor, pages: Tensor, **_: object) -> dict:
    return {"slots": torch.where(slots < 0, slots, (slots + 1) % (len(pages) * pages.shape[2]))}


def padding_to_the_last_slot(slots: Tensor, pages: Tensor, **_: object) -> dict:
    return {"slots": slots % (len(pages) * pages.shape[2])}


def without_gaps(pages: Tensor, **_: object) -> dict:
    return {"pages": pages.as_strided(pages.shape, (pages[0].numel(), pages.stride(1), 1))}


def query_heads_by_turns(query: Tensor, **_: object) -> dict:
    return {"query": query.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)}


def windowed(check: Callable[..., None]) -> Callable[[Engine], None]:
    return lambda engine: check(engine, WINDOWED)


def window_padding_written(slots: Tensor, pages: Tensor, **_: object) -> dict:
    return {"slots": slots % (len(pages) * pages.shape[2])}


PLANTED: dict[str, tuple[Fault, Callable[[Engine], None]]] = {
    "slot off by one": (plant("write", next_slot), check_attention),
    "padding written": (plant("write", padding_to_the_last_slot), check_store),
    "rest of the block cleared": (plant("write", clear_rest_of_blocks), check_store),
    "heads swapped": (plant("write", lambda key, **_: {"key": key.flip(1)}), check_store),
    "keys and values swapped": (plant("write", lambda key, value, **_: {"key": value, "value": key}), check_store),
    "position off by one": (plant("write", lambda positions, **_: {"positions": positions + 1}), check_store),
    "positions counted from the step": (
        plant("write", lambda positions, **_: {"positions": positions - positions.min()}),
        check_chunks,
    ),
    "rotation dropped when writing": (recode("write", no_rotary), check_store),
    "rotation dropped when reading": (recode("attend", no_rotary), check_attention),
    "widths of another head": (recode("write", lambda codec: {"layout": codec.layout.shard([1, 0], 0)}), check_store),
    "keys' and values' widths swapped": (recode("attend", swapped_widths), check_attention),
    "codebook of another head": (recode("attend", rolled_levels(0)), check_attention),
    "codebook of the next group": (recode("attend", rolled_levels(1)), check_attention),
    "levels off by one": (recode("attend", rolled_levels(2)), check_attention),
    "sink missing": (recode("attend", mean_as_sink), check_attention),
    "sink read in the units of ordinary tokens": (recode("attend", every_sink_coded), check_attention),
    "scale wrong": (plant("attend", lambda scale, **_: {"scale": scale * 1.001}), check_attention),
    "causal mask ignored": (plant("attend", no_causal_mask), check_attention),
    "query heads of another group": (plant("attend", query_heads_by_turns), check_attention),
    "raw keys instead of stored ones": (raw_keys, check_attention),
    "stale tail read": (
        plant("attend", in_batch(lambda batch: {"seq_lens": batch.seq_lens + 1})),
        check_poison,
    ),
    "null block read": (
        plant("attend", in_batch(lambda batch: {"block_table": batch.block_table * (batch.block_table != 3)})),
        check_poison,
    ),
    "another sequence's blocks": (
        plant("attend", in_batch(lambda batch: {"block_table": batch.block_table.roll(1, 0)})),
        check_batching,
    ),
    "length of the longest sequence": (
        plant("attend", in_batch(lambda batch: {"seq_lens": batch.seq_lens.max().expand_as(batch.seq_lens)})),
        check_batching,
    ),
    "window one token too wide": (
        plant("attend", in_window(lambda window: {"size": window.size + 1})),
        windowed(check_attention),
    ),
    "window one token too narrow": (
        plant("attend", in_window(lambda window: {"size": window.size - 1})),
        windowed(check_attention),
    ),
    "window ignored": (plant("attend", lambda **_: {"window": None}), windowed(check_attention)),
    "window of another sequence": (
        plant("attend", in_window(lambda window: {"block_table": window.block_table.roll(1, 0)})),
        windowed(check_batching),
    ),
    "window of the whole step": (
        plant("attend", in_window(lambda window: {"whole_chunk": True})),
        windowed(check_attention),
    ),
    "window's heads swapped": (
        plant("write_window", lambda key, **_: {"key": key.flip(1)}),
        windowed(check_attention),
    ),
    "window's keys and values swapped": (
        plant("write_window", lambda key, value, **_: {"key": value, "value": key}),
        windowed(check_attention),
    ),
    "window's padding written": (
        plant("write_window", window_padding_written),
        windowed(check_window_store),
    ),
    "gaps between pages ignored": (plant("write", without_gaps), check_strided),
    "a copy of the pages written": (plant("write", lambda pages, **_: {"pages": pages.contiguous()}), check_strided),
}


@pytest.mark.parametrize(("fault", "check"), PLANTED.values(), ids=PLANTED)
def test_planted_bug_is_caught(engine, fault, check):
    check(engine)
    with pytest.raises(AssertionError, match="broken promise"):
        check(fault(engine))


WRONG_SLICES = {
    "ranks interleaved": lambda heads, rank, ranks: list(range(heads))[rank::ranks],
    "first rank's heads everywhere": lambda heads, rank, ranks: list(range(heads // ranks)),
}


@pytest.mark.parametrize("slices", WRONG_SLICES.values(), ids=WRONG_SLICES)
def test_planted_wrong_rank_slice_is_caught(engine, monkeypatch, slices):
    monkeypatch.setattr(contents, "heads_of_rank", slices)
    with pytest.raises(AssertionError, match="broken promise"):
        check_ranks(engine, heads=6, ranks=3)

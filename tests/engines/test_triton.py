"""The GPU engine where there is no GPU: its kernels in Triton's interpreter, on a small part of `test_engines`' grid.

With a GPU, that file runs all of its grid on it, and this one what a graph needs.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu
from tests.cases import (
    CANARY,
    GOLDEN,
    Case,
    NoHostReads,
    expect_close,
    make_step,
    make_tokens,
    random_case,
    with_tensors,
)
from tests.engines import checks
from tests.engines import test_engines as grid
from tests.engines import test_planted as planted
from tests.engines.device import DEVICE, OnDevice
from vllm_kvsplice.engines import Batch, reference, triton
from vllm_kvsplice.engines.triton import TritonEngine
from vllm_kvsplice.engines.triton.kernels import attention, prompt
from vllm_kvsplice.engines.triton.tables import State, reads_fast

pytestmark = pytest.mark.triton

NARROW = tuple(range(8))
SMALL = Case(((1, 21), (3, 17), (1, 1)), group=2)
SMALL_WINDOW = replace(SMALL, window=6)
SMALL_PROMPT = Case(((70, 90), (66, 66), (65, 130)), heads=1, group=1, window=6)
SMALL_UNIFORM = replace(SMALL, widths=NARROW, block=32, uniform=True, window=6)
CASES = [
    Case(((1, 1),)),
    Case(((1, 40), (19, 19), (1, 17))),
    Case(((2, 33), (1, 1)), heads=1, group=16, dim=256, block=256, window=5),
    Case(((1, 150), (9, 70)), heads=1, group=9, dim=128, block=48, window=17, window_block=5),
    Case(((1, 130), (1, 64), (1, 65)), heads=3, group=1, dim=64, block=64, rotary="interleaved", sinks="coded"),
    Case(((5, 33),), dim=64, rotary="partial", sinks="replaced"),
    Case(((5, 33),), dim=96, rotary="partial-interleaved", block=32, window=1000),
    Case(((3, 18),), dim=8, rotary="none", group=5),
    Case(((1, 40), (20, 30)), window=3, whole_chunk=True),
    Case(((33, 40),), heads=1, group=1, widths=(7,), dim=32),
    Case(((1, 300),), heads=1, group=4, widths=(2, 3, 3, 3, 4, 4, 4, 5), dim=64, block=96, window=32, window_block=16),
    # With eight bits or short blocks, evenly spaced levels are looked up like others.
    Case(((1, 40),), block=32, uniform=True),
    Case(((1, 40),), widths=NARROW, uniform=True),
    Case(
        ((1, 150), (9, 70)), heads=1, group=9, dim=128, block=64, widths=NARROW, window=17, window_block=5, uniform=True
    ),
    Case(((5, 33), (1, 64), (1, 65)), dim=64, block=32, widths=NARROW, rotary="partial", sinks="coded", uniform=True),
    Case(((5, 63),), dim=96, block=32, widths=NARROW, rotary="partial-interleaved", uniform=True),
    Case(((1, 300), (1, 1)), group=8, dim=64, block=96, widths=(1, 2, 4), window=32, window_block=16, uniform=True),
    Case(((33, 70),), heads=1, group=1, dim=256, block=64, widths=(7, 6, 5), whole_chunk=True, window=3, uniform=True),
    # Prompts, whose tokens are unpacked for many rows at once.
    Case(((40, 150), (64, 64)), heads=2, group=2, sinks="replaced"),
    Case(((140, 300),), heads=1, group=1, dim=64, rotary="interleaved", window=32, window_block=16),
    Case(((70, 300), (64, 64)), heads=1, group=1, dim=40, rotary="none", window=3, whole_chunk=True),
    Case(((90, 200),), heads=1, group=2, dim=128, block=64, widths=NARROW, rotary="partial", window=17, uniform=True),
    Case(((33, 70),), heads=1, group=3, dim=256, block=64),
]


@pytest.fixture
def engine() -> OnDevice:
    return OnDevice()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_dense_attention_over_what_the_codec_restores(engine, case):
    checks.check_attention(engine, case)


def test_splits_are_merged_a_few_at_a_time(engine, monkeypatch):
    case = Case(((1, 300), (1, 9)), heads=1, group=4, dim=64, block=64, widths=NARROW, window=6, uniform=True)
    monkeypatch.setattr(triton, "MERGED_NUMBERS", 2 * case.dim)
    monkeypatch.setattr(triton, "_splits", lambda programs, places: 5)
    checks.check_attention(engine, case)


def test_only_evenly_spaced_levels_without_eight_bits_are_read_fast():
    codecs = [Case(widths=widths, uniform=uniform).codec() for widths in (NARROW, (3, 8)) for uniform in (True, False)]
    assert [reads_fast(codec) for codec in codecs] == [True, False, False, False]


def test_prompts_go_on_from_segment_to_segment(engine, monkeypatch):
    monkeypatch.setattr(triton, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(triton, "State", lambda *tensors: State(*(x.fill_(torch.nan) for x in tensors)))
    checks.check_attention(engine, Case(((150, 150),), heads=1, group=1, window=100))
    checks.check_attention(engine, Case(((70, 300), (66, 66), (70, 129)), heads=1, group=1, window=6))
    checks.check_attention(engine, Case(((40, 300),), heads=2, group=2, dim=128, block=48))


@pytest.mark.parametrize("width", GOLDEN)
def test_stored_bytes_are_the_hand_worked_ones(engine, width):
    grid.test_stored_bytes_are_the_hand_worked_ones(engine, width)


def test_random_writes_change_their_slots_and_nothing_else(engine):
    for seed in range(20):
        checks.check_store(engine, random_case(seed))
    checks.check_window_store(engine, SMALL_WINDOW)


def test_codes_are_the_references(engine):
    """Sums in float64 leave ties to chance only where they differ in the last of 53 bits: never seen."""
    codec = Case(dim=64, heads=2).codec()
    key, value, positions = make_tokens(codec, 600)
    pages = torch.full((2, 1, codec.layout.token_bytes, 608), CANARY, dtype=torch.uint8)
    for kernels, page in zip((engine, reference), pages, strict=True):
        # Positions of long contexts, where angles are large.
        kernels.write(codec, key.bfloat16(), value.bfloat16(), 211 * positions, positions, page)
    assert int((pages[0] != pages[1]).sum()) == 0


@pytest.mark.parametrize("case", [SMALL, SMALL_WINDOW, SMALL_UNIFORM, SMALL_PROMPT], ids=str)
def test_nothing_but_its_own_tokens_has_influence(engine, case):
    checks.check_poison(engine, case)
    checks.check_batching(engine, case)


def test_pages_may_lie_apart_and_far_away(engine):
    checks.check_strided(engine, SMALL)
    checks.check_strided(engine, SMALL_UNIFORM)
    grid.test_pages_past_2_and_4_gib_behave_like_near_ones(engine, grid.GIB)


def test_slices_of_a_fused_projection_are_read_where_they_lie(engine):
    grid.test_slices_of_a_fused_projection_are_read_where_they_lie(engine)


def test_rows_past_the_last_query_come_back_as_zeros(engine):
    step = make_step(SMALL).store(engine)
    padded = torch.cat((step.query, torch.full_like(step.query[:3], torch.nan)))
    output = engine.attend(step.codec, padded, step.pages, step.batch, step.scale, None)
    expect_close(output[:-3], step.attend(engine), engine.order_limit, "padding changes nothing")
    assert not output[-3:].any()


FAULTS = [
    "padding written",
    "position off by one",
    "codebook of the next group",
    "scale wrong",
    "window one token too wide",
    "window's padding written",
]


@pytest.mark.parametrize("name", FAULTS)
def test_planted_bug_is_caught(engine, name):
    planted.test_planted_bug_is_caught(engine, *planted.PLANTED[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_windows_of_all_dtypes_are_read_and_written(engine, dtype):
    step = make_step(SMALL_WINDOW)
    step = replace(with_tensors(step, lambda x: x.to(dtype)), window_pages=step.window_pages.to(dtype))
    expected = step.store(reference).attend(reference)
    # Probabilities of exact tokens are rounded to the window's type.
    limit = max(engine.oracle_limit, torch.finfo(dtype).eps)
    expect_close(step.store(engine).attend(engine), expected, limit, f"a window of {dtype} is read")


@pytest.mark.parametrize("queries", [1, 64])
def test_a_step_reads_no_value_on_the_host_and_launches_the_same_whatever_the_lengths(monkeypatch, queries):
    launches = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, launch_grid):
            return lambda *arguments, **constants: launches.append((self.name, launch_grid, constants))

    for module, names in ((attention, ("absorb", "attend", "finish")), (prompt, ("rebuild", "prompt"))):
        for name in names:
            monkeypatch.setattr(module, f"{name}_kernel", Recorder(name))
    for lengths in ((1, 9, 300), (250, 1, 1)):
        step = make_step(Case(tuple((queries, queries + n) for n in lengths), window=8))
        window, batch = step.window, replace(step.batch, longest=400)
        TritonEngine().attend(step.codec, step.query, step.pages, batch, step.scale, window)
        with NoHostReads():
            TritonEngine().attend(step.codec, step.query, step.pages, batch, step.scale, window)
    names = ["absorb", "attend", "finish"] if queries == 1 else ["rebuild", "prompt"]
    assert [name for name, *_ in launches[: len(names)]] == names
    assert all(launches[len(names) * i :][: len(names)] == launches[: len(names)] for i in range(1, 4))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths():
    short, long = (make_step(Case(((1, n), (1, n + 3)), block=64, dim=64, window=8)) for n in (5, 500))
    engine, there = TritonEngine(), []
    for step in (short, long):
        step.store(reference)
        batch = (step.batch.query_start, step.batch.seq_lens, step.batch.block_table)
        tensors = [step.query, step.pages, *batch, step.window.pages, step.window.block_table]
        there.append([tensor.to(DEVICE) for tensor in tensors])
    buffers = [torch.zeros_like(b).resize_(b.shape) for b in there[1]]
    codec = long.codec.to(DEVICE)

    def run() -> torch.Tensor:
        query, pages, *batch, window_pages, table = buffers
        window = replace(long.window, pages=window_pages, block_table=table)
        return engine.attend(codec, query, pages, Batch(*batch), long.scale, window)

    def fill(tensors: list[torch.Tensor]) -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer[tuple(map(slice, tensor.shape))] = tensor

    fill(there[0])
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    for step, tensors in ((short, there[0]), (long, there[1])):
        fill(tensors)
        graph.replay()
        expect_close(output.cpu(), step.attend(reference), OnDevice.oracle_limit, "a replayed graph answers")


def test_the_gpu_benchmark_checks_what_it_measures(monkeypatch):
    monkeypatch.setitem(gpu.SHAPES, "32/8x128", (4, 1, 128))
    gpu.check(DEVICE, context=128)
    monkeypatch.setattr(reference, "attend", lambda codec, query, *_: torch.ones_like(query, dtype=torch.float32))
    with pytest.raises(SystemExit, match="wrong on this GPU"):
        gpu.check(DEVICE, context=128)


def gpu_variants(*options: str) -> str:
    """What `benchmarks.gpu_variants` prints, in a process of its own: here kernels are interpreted."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_variants", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_request_waits_for_a_compiler():
    assert gpu_variants("--unrehearsed").split() == []


def test_kernels_hardly_ever_need_spilled_registers_on_sm_80_and_sm_90():
    rows = json.loads(gpu_variants("--corners", "--json"))
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    assert {row["kernel"] for row in rows} == {"encode", "copy", "absorb", "attend", "finish", "rebuild", "prompt"}
    for row in rows:
        print(row)
        if row.get("uniform"):
            assert row["per_latent"]["local"] < 0.05 * row["per_latent"]["all"], row
        else:
            assert row["spilled_bytes"] <= (512 if row["kernel"] == "prompt" else 0), row
        assert row["shared_bytes"] <= 99 << 10, row

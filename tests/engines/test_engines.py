"""Every engine stores exactly the codec's bytes and attends to exactly what is stored.

The checks are plain functions of an engine. `PLANTED` runs each against an engine with one fault and expects it to notice.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.cases import (
    ALL_WIDTHS,
    CANARY,
    GOLDEN,
    GOLDEN_LATENTS,
    MIXED,
    ROTARIES,
    SINKS,
    Case,
    Step,
    dense_attention,
    expect,
    expect_close,
    make_artifact,
    make_identity_codec,
    make_step,
    make_tokens,
    packed_by_hand,
    random_case,
    threads,
)
from tests.engines.device import OnDevice
from vllm_kvsplice import artifact as artifact_module
from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines import Batch, Engine, Window, get_engine, reference
from vllm_kvsplice.engines.cpu import ISA_VARIABLE, CpuEngine, instruction_sets
from vllm_kvsplice.errors import KVSpliceError

# All relative to the largest output (about 3). Measured on the reference engine over every case below: 2.3e-6. The CPU
# engine's queries have 16 bits and its probabilities 15: 7.8e-5; with AMX, where the mean keys of prompts have 16 bits as
# well: 1.8e-4. bfloat16 rounds by 2e-3.
ORACLE_LIMIT, CPU_ORACLE_LIMIT = 5e-6, 2e-4
# Between two float32 runs of the reference that only sum in another order; measured: 1.8e-7. The CPU engine promises the
# same bits, but not with AMX, which multiplies many rows in one way and few in another.
ORDER_LIMIT = 1e-6

STEP = Case(MIXED)
WINDOWED = Case(MIXED, window=16)


ON_GPU = [pytest.param("triton", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in instruction_sets()), *ON_GPU])
def engine(request) -> Engine:
    name, _, isa = request.param.partition("-")
    return OnDevice() if name == "triton" else CpuEngine(isa) if isa else get_engine(name)


def oracle_limit(engine: Engine) -> float:
    return getattr(engine, "oracle_limit", CPU_ORACLE_LIMIT if hasattr(engine, "isa") else ORACLE_LIMIT)


def order_limit(engine: Engine) -> float:
    by_isa = {None: ORDER_LIMIT, "amx": CPU_ORACLE_LIMIT}
    return getattr(engine, "order_limit", by_isa.get(getattr(engine, "isa", None), 0))


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


# --- checks ---------------------------------------------------------------------------------------------------------


def check_store(engine: Engine, case: Case = STEP) -> None:
    """Random slots get the documented bytes, padding (-1) goes nowhere, every other byte survives."""
    codec, blocks, random = case.codec(), 5, torch.Generator().manual_seed(case.seed)
    pages = torch.full((blocks, codec.layout.token_bytes, case.block), CANARY, dtype=torch.uint8)
    slots = torch.randperm(blocks * case.block, generator=random)[:17]
    slots[torch.randperm(17, generator=random)[:3]] = -1
    key, value, positions = make_tokens(codec, 17, seed=case.seed)
    expected = pages.clone()
    codes = codec.encode(key, value, positions).tolist()
    for slot, row in zip(slots.tolist(), codes, strict=True):
        if slot >= 0:
            expected[slot // case.block, :, slot % case.block] = torch.tensor(list(packed_by_hand(codec.layout, row)))
    engine.write(codec, key, value, positions, slots, pages)
    expect(torch.equal(pages, expected), f"written slots and nothing else change as documented, {case}")


def check_window_store(engine: Engine, case: Case = WINDOWED) -> None:
    """The window's pages get each token's key and value as they are, padding (-1) goes nowhere."""
    step = make_step(case).store(engine)
    expected = torch.full_like(step.window_pages, torch.nan)
    key, value, _ = step.tokens
    size = step.window_pages.shape[2]
    for slot, token in zip(step.window_slots.tolist(), torch.cat((key, value), -1), strict=True):
        if slot >= 0:
            expected[slot // size, :, slot % size] = token
    same = (step.window_pages == expected) | (step.window_pages.isnan() & expected.isnan())
    expect(same.all(), f"the window holds its tokens and nothing else changes, {case}")


def check_chunks(engine: Engine, case: Case = STEP) -> None:
    """However a sequence is cut into steps, its bytes are the same."""
    whole = make_step(replace(case, sequences=((1, 65),))).store(engine)
    for chunk in (1, 7, 16, 17, 64):
        step = make_step(replace(case, sequences=((1, 65),)))
        for part in zip(*(x.split(chunk) for x in (*step.tokens, step.slots)), strict=True):
            engine.write(step.codec, *part, step.pages)
        expect(torch.equal(step.pages, whole.pages), f"chunks of {chunk} store the same bytes, {case}")


def check_attention(engine: Engine, case: Case = STEP) -> None:
    """Attention over pages is dense attention over what the codec restores."""
    step = make_step(case).store(engine)
    expect_close(step.attend(engine), step.oracle(), oracle_limit(engine), f"attention equals the oracle, {case}")


def check_poison(engine: Engine, case: Case = STEP) -> None:
    """Bytes that no query of the step reads have no influence at all, in neither cache."""
    step = make_step(case).store(engine)
    before = step.attend(engine)
    foreign = step.unread()[:, None].expand_as(step.pages)
    noise = torch.randint(256, step.pages.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(case.seed))
    for poison in (torch.tensor(0, dtype=torch.uint8), torch.tensor(255, dtype=torch.uint8), noise):
        after = replace(poisoned_window(step, poison), pages=torch.where(foreign, poison, step.pages)).attend(engine)
        expect(after.isfinite().all(), f"output is finite, {case}")
        expect(torch.equal(before, after), f"foreign bytes have no influence, {case}")


def poisoned_window(step: Step, poison: Tensor) -> Step:
    """The same step with NaN or infinities wherever the exact window holds no token that one of its queries reads."""
    if step.window_pages is None:
        return step
    foreign = torch.ones(step.window_pages.shape[0] * step.window_pages.shape[2], dtype=torch.bool)
    foreign[step.window_slots[step.window_slots >= 0]] = False
    foreign = foreign.view(-1, 1, step.window_pages.shape[2], 1)
    return replace(
        step, window_pages=step.window_pages.masked_fill(foreign, [torch.inf, torch.nan][int(poison.max() > 0)])
    )


def check_batching(engine: Engine, case: Case = STEP) -> None:
    """A sequence's output does not depend on its neighbours in the step, nor on its place among them."""
    step = make_step(case).store(engine)
    together = step.attend(engine).split([len(r.query) for r in step.requests])
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = step.pick(order).attend(engine).split([len(together[i]) for i in order])
    for place, index in enumerate(order):
        alone = step.pick([index]).attend(engine)
        expect_close(
            together[index], alone, order_limit(engine), f"sequence {index} in a batch equals itself alone, {case}"
        )
        expect_close(
            shuffled[place], alone, order_limit(engine), f"sequence {index} in any place equals itself alone, {case}"
        )


def check_strided(engine: Engine, case: Case = STEP) -> None:
    """Pages of one layer among others' (only each page itself is contiguous) behave like pages alone."""
    near = make_step(case).store(engine)
    storage = torch.full((near.pages.shape[0], 3, *near.pages.shape[1:]), CANARY, dtype=torch.uint8)
    far = replace(near, pages=storage[:, 1]).store(engine)
    expect(torch.equal(far.pages, near.pages), "strided pages hold the same bytes")
    expect((storage[:, 0::2] == CANARY).all(), "other layers' bytes survive")
    storage[:, 0::2] = 255
    expect(torch.equal(far.attend(engine), near.attend(engine)), "strided pages give the same output")


def check_ranks(engine: Engine, heads: int = 6, ranks: int = 3) -> None:
    """Tensor-parallel ranks side by side equal one rank."""
    case = Case(MIXED, heads=heads, group=4, dim=32)
    whole = make_step(case).store(engine)
    artifact, outputs = make_artifact(whole.codec, case.group), []
    for rank in range(ranks):
        # vLLM hands a rank its share of the query heads in order, and the KV heads that those read.
        queries = whole.query.shape[1] // ranks
        own = slice(rank * heads // ranks, max((rank + 1) * heads // ranks, rank * heads // ranks + 1))
        requests = [
            replace(
                r,
                query=r.query[:, rank * queries : (rank + 1) * queries],
                key=r.key[:, own],
                value=r.value[:, own],
            )
            for r in whole.requests
        ]
        codec = artifact.layer_shard(0, rank, ranks)
        pages = torch.full((len(whole.pages), codec.layout.token_bytes, case.block), CANARY, dtype=torch.uint8)
        outputs.append(Step(codec, requests, pages, whole.scale).store(engine).attend(engine))
    expect_close(torch.cat(outputs, 1), whole.attend(engine), order_limit(engine), f"{ranks} ranks equal one")


# --- promises -------------------------------------------------------------------------------------------------------

SHAPES = [
    Case(((1, 1),)),
    Case(((33, 33),), group=1),
    Case(((1, 300),), heads=3, dim=64),
    Case(((7, 33),), group=9, block=32),
    Case(((64, 201),), heads=1, group=1, dim=128, block=128),
    Case(((17, 17), (1, 129)), group=9, dim=128, block=128),
    Case(((3, 4999),), heads=1, group=1, block=128),
    *(Case(MIXED, rotary=rotary, dim=64, sinks=sinks) for rotary in ROTARIES for sinks in SINKS),
    *(Case(MIXED, widths=(width,), heads=1, group=1) for width in ALL_WIDTHS),
    *(Case(MIXED, group=group, dim=dim, block=32) for group in (1, 3, 9) for dim in (32, 64, 128)),
]
SHAPES += [
    *(Case(MIXED, window=w, window_block=n) for w in (1, 2, 7, 16, 17, 33, 48, 1000) for n in (1, 5, 8, 16)),
    *(Case(MIXED, window=w, whole_chunk=True) for w in (1, 16, 48)),
    *(Case(MIXED, window=8, rotary=rotary, sinks=sinks) for rotary in ROTARIES for sinks in SINKS),
    Case(((1, 300), (150, 300), (140, 140)), window=32, window_block=16, dim=64),
    Case(((1, 300), (150, 300), (140, 140)), window=32, whole_chunk=True),
    Case(((3, 4999),), heads=1, group=1, block=128, window=128, window_block=16),
    Case(((1, 700), (5, 1300), (40, 40)), group=16, dim=256, block=256, window=32, window_block=16),
    # More query rows than share a block anywhere, over several splits and segments of the mean keys' series.
    Case(((100, 1700),), group=3, dim=64, block=64),
    Case(((30, 1100), (1, 513), (9, 512)), heads=1, group=7, dim=96, block=48, window=33),
    *(Case(((1, 1100), (70, 600)), group=2, dim=64, block=n, window=20) for n in (48, 64, 96)),
]
# One, two or three queries at every fill of the last block, with and without full blocks before it.
RESIDUES = [
    Case(tuple((1 + n % min(n, 3), n) for n in range(first, first + block)), block=block, dim=dim)
    for first, block, dim in ((1, 16, 64), (257, 16, 32), (33, 32, 128), (1, 128, 32))
]


LARGE = Case(((1, 257), (129, 257), (1, 1), (64, 64), (1, 300)), heads=3, dim=64)


@pytest.mark.parametrize("case", SHAPES + RESIDUES, ids=str)
def test_attention_equals_dense_attention_over_what_the_codec_restores(engine, case):
    check_attention(engine, case)


@pytest.mark.parametrize("width", GOLDEN)
def test_stored_bytes_are_the_hand_worked_ones(engine, width):
    codec = make_identity_codec([width, 8], [8, width])
    low, full = torch.tensor(GOLDEN_LATENTS).remainder(1 << width).float(), torch.tensor(GOLDEN_LATENTS).float()
    pages = torch.full((3, codec.layout.token_bytes, 16), CANARY, dtype=torch.uint8)
    key, value = torch.cat((low, full)).view(1, 1, 16), torch.cat((full, low)).view(1, 1, 16)
    engine.write(codec, key, value, torch.tensor([4]), torch.tensor([2 * 16 + 5]), pages)
    by_hand = bytes.fromhex(GOLDEN[width] + 2 * GOLDEN[8] + GOLDEN[width])
    assert bytes(pages[2, :, 5].tolist()) == by_hand.ljust(codec.layout.token_bytes, b"\0")


def test_200_random_writes_change_their_slots_and_nothing_else(engine):
    for seed in range(200):
        check_store(engine, random_case(seed))


def test_a_step_of_padding_alone_writes_nothing(engine):
    step = make_step(Case())
    before = step.pages.clone()
    # Of its own, because a rotary that was used before answers from its tables.
    engine.write(Case().codec(), *step.tokens, torch.full_like(step.slots, -1), step.pages)
    assert torch.equal(step.pages, before)


@pytest.mark.parametrize("rotary", ROTARIES)
def test_bytes_do_not_depend_on_how_a_sequence_is_cut_into_steps(engine, rotary):
    check_chunks(engine, Case(rotary=rotary, dim=64))


def test_500_outputs_with_poisoned_foreign_bytes_are_finite_and_bitwise_the_same(engine):
    for seed in range(170):
        check_poison(engine, random_case(seed))


@pytest.mark.parametrize("case", [STEP, Case(MIXED, group=9, dim=128, block=128), random_case(3)], ids=str)
def test_a_mixed_step_equals_its_sequences_one_by_one_in_any_order(engine, case):
    check_batching(engine, case)


@pytest.mark.parametrize("case", [STEP, Case(MIXED, dim=128, block=128)], ids=str)
def test_pages_between_other_layers_pages_behave_like_pages_alone(engine, case):
    check_strided(engine, case)


@pytest.mark.parametrize(("heads", "ranks"), [(6, 2), (6, 3), (6, 6), (3, 1), (2, 4), (1, 4)])
def test_tensor_parallel_ranks_side_by_side_equal_one_rank(engine, heads, ranks):
    check_ranks(engine, heads, ranks)


@pytest.mark.parametrize("window", [64, 100])
def test_a_window_as_long_as_the_context_is_dense_attention(engine, window):
    step = make_step(Case(((1, 40), (33, 64)), window=window)).store(engine)
    dense = [dense_attention(r.query, r.key, r.value, step.scale) for r in step.requests]
    expect_close(step.attend(engine), torch.cat(dense), oracle_limit(engine), "everything is read exactly")


def test_no_window_is_the_pure_codec(engine):
    step = make_step(STEP).store(engine)
    pure = [
        dense_attention(r.query, *step.codec.reconstruct(r.key, r.value, r.positions), step.scale)
        for r in step.requests
    ]
    expect_close(step.attend(engine), torch.cat(pure), oracle_limit(engine), "everything is read as stored")


@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 64])
def test_what_a_query_reads_does_not_depend_on_how_its_sequence_was_cut_into_steps(engine, chunk):
    step = make_step(Case(((65, 65),), window=12, window_block=4)).store(engine)
    whole, request = step.attend(engine), step.requests[0]
    for first in range(0, 65, chunk):
        end = min(65, first + chunk)
        part = replace(request, query=request.query[first:end], key=request.key[:end], value=request.value[:end])
        output = replace(step, requests=[part]).attend(engine)
        expect_close(output, whole[first:end], order_limit(engine), f"chunks of {chunk} read what the whole reads")


@pytest.mark.parametrize("sinks", SINKS)
def test_the_first_token_alone_attends_to_its_own_value(engine, sinks):
    step = make_step(Case(((1, 1),), group=1, sinks=sinks)).store(engine)
    restored = step.codec.reconstruct(*step.tokens)[1]
    expect_close(
        step.attend(engine), restored, max(order_limit(engine), ORDER_LIMIT), "a lone token's output is its value"
    )


def with_tensors(step: Step, change: Callable[[Tensor], Tensor]) -> Step:
    """The same step with every query, key and value changed, and pages of its own."""
    requests = [
        replace(r, **{name: change(getattr(r, name)) for name in ("query", "key", "value")}) for r in step.requests
    ]
    return replace(step, requests=requests, pages=step.pages.clone())


def test_bfloat16_tokens_and_queries_are_treated_like_their_float32_copies(engine):
    narrow = with_tensors(make_step(STEP), Tensor.bfloat16)
    wide = with_tensors(narrow, Tensor.float)
    outputs = [step.store(engine).attend(engine) for step in (narrow, wide)]
    assert torch.equal(narrow.pages, wide.pages)
    assert outputs[0].dtype == torch.float32
    assert torch.equal(*outputs)


def test_slices_of_a_fused_projection_are_read_where_they_lie(engine):
    step = make_step(Case(((33, 33),)))
    key, value, positions = step.tokens
    query, sliced_key, sliced_value = torch.cat((step.query, key, value), 1).split([6, 2, 2], 1)
    assert not sliced_key.is_contiguous()
    engine.write(step.codec, sliced_key, sliced_value, positions, step.slots, step.pages)
    output = engine.attend(step.codec, query, step.pages, step.batch, step.scale, None)
    assert torch.equal(output, replace(step, pages=step.pages.clone()).store(engine).attend(engine))


@pytest.mark.parametrize("count", [2, 3])
def test_bytes_and_output_do_not_depend_on_the_number_of_threads(engine, count):
    alone, together = make_step(LARGE), make_step(LARGE)
    output = alone.store(engine).attend(engine)
    with threads(count):
        expect_close(together.store(engine).attend(engine), output, order_limit(engine), "threads give the same output")
    assert torch.equal(together.pages, alone.pages)


def test_rows_past_the_last_query_are_ignored(engine):
    step = make_step(STEP).store(engine)
    padded = torch.cat((step.query, torch.full_like(step.query[:5], torch.nan)))
    output = engine.attend(step.codec, padded, step.pages, step.batch, step.scale, step.window)
    assert torch.equal(output[: len(step.query)], step.attend(engine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_output_given_is_written_in_its_dtype_and_nothing_beside_it(engine, dtype):
    step = make_step(STEP).store(engine)
    expected = step.attend(engine)
    room = torch.full((len(expected) + 2, 2, *expected.shape[1:]), torch.nan, dtype=dtype)
    output = room[1:-1, 0]
    returned = engine.attend(step.codec, step.query, step.pages, step.batch, step.scale, step.window, output)
    assert returned is output
    assert torch.equal(output, expected.to(dtype))
    assert room[0].isnan().all()
    assert room[-1].isnan().all()
    assert room[:, 1].isnan().all()


GIB = 1 << 30


@pytest.mark.parametrize("stride", [None, GIB], ids=["many small pages", "few pages a GiB apart"])
def test_pages_past_2_and_4_gib_behave_like_near_ones(engine, stride):
    near = make_step(Case(((3, 33),))).store(engine)
    page = near.pages[0].numel()
    # The system commits only what is touched, six pages.
    storage = torch.empty(6 * GIB, dtype=torch.uint8)
    stride = stride or page
    pages = storage.as_strided((len(storage) // stride, *near.pages.shape[1:]), (stride, 16, 1))
    # The sequence's three blocks, the last three here, hold bytes 2 GiB and 4 GiB, and the end.
    places = torch.tensor([0, 1, *(n * GIB // stride for n in (3, 2, 4)), len(pages) - 1])
    pages[places] = CANARY
    far = replace(near, pages=pages, requests=[replace(r, blocks=places[r.blocks]) for r in near.requests])
    far.store(engine)
    assert torch.equal(pages[places], near.pages)
    assert torch.equal(far.attend(engine), near.attend(engine))


LONG = Case(((5, 1500), (40, 620), (1, 700), (70, 70)), dim=64, block=64, window=32, window_block=16)


@pytest.mark.parametrize("isa", instruction_sets())
def test_the_cpu_engine_answers_the_same_alone_in_chunks_and_on_any_number_of_threads(isa):
    engine = CpuEngine(isa)
    step = make_step(LONG).store(engine)
    whole = step.attend(engine)
    with threads(3):
        expect_close(step.attend(engine), whole, order_limit(engine), "three threads answer what one does")
    for index, expected in enumerate(whole.split([len(r.query) for r in step.requests])):
        request = step.requests[index]
        first, last = len(request.key) - len(request.query), len(request.key)
        for start, end in ((first, last), (first, first + 1), ((first + last) // 2, last)):
            part = replace(
                request,
                query=request.query[start - first : end - first],
                key=request.key[:end],
                value=request.value[:end],
            )
            alone = replace(step, requests=[part]).attend(engine)
            expect_close(alone, expected[start - first : end - first], order_limit(engine), "a part equals the whole's")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", instruction_sets())
def test_the_cpu_engine_reads_and_writes_all_dtypes_of_a_window(isa, dtype):
    step = make_step(WINDOWED)
    step = replace(with_tensors(step, lambda x: x.to(dtype)), window_pages=step.window_pages.to(dtype))
    engine = CpuEngine(isa)
    expected, output = (step.store(each).attend(each) for each in (reference, engine))
    expect_close(output, expected, oracle_limit(engine), f"a window of {dtype} is read like by the reference")


def test_the_instruction_set_can_be_chosen(monkeypatch):
    for isa in instruction_sets():
        monkeypatch.setenv(ISA_VARIABLE, isa)
        assert CpuEngine().isa == isa
    monkeypatch.setenv(ISA_VARIABLE, "mmx")
    with pytest.raises(KVSpliceError, match=r"'mmx'; choose one of .*portable"):
        CpuEngine()


def test_an_unknown_engine_is_refused_with_the_choices():
    with pytest.raises(KVSpliceError, match=r"'warp' is unknown; choose one of .*reference"):
        get_engine("warp")


# --- planted bugs ---------------------------------------------------------------------------------------------------

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
    monkeypatch.setattr(artifact_module, "heads_of_rank", slices)
    with pytest.raises(AssertionError, match="broken promise"):
        check_ranks(engine, heads=6, ranks=3)

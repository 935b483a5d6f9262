"""Every engine stores exactly the codec's bytes and attends to exactly what is stored."""

from dataclasses import replace

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
    dense_attention,
    expect_close,
    make_identity_codec,
    make_step,
    random_case,
    threads,
    with_tensors,
)
from tests.codecs import make_codec
from tests.engines.checks import (
    ORDER_LIMIT,
    STEP,
    WINDOWED,
    check_attention,
    check_batching,
    check_chunks,
    check_poison,
    check_ranks,
    check_store,
    check_strided,
    oracle_limit,
    order_limit,
)
from vllm_kvsplice.codec import KindCodec
from vllm_kvsplice.engines import get_engine, reference
from vllm_kvsplice.engines.cpu import ISA_VARIABLE, CpuEngine, instruction_sets
from vllm_kvsplice.errors import KVSpliceError

SHAPES = [
    Case(((1, 1),)),
    Case(((1, 40), (0, 17), (3, 9))),
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
    Case(((90, 700), (8, 8)), group=3, dim=80, window=32, whole_chunk=True),
    Case(((50, 130), (1, 5)), heads=1, group=5, dim=40, window=100),
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


def without(half: KindCodec, direction: Tensor) -> KindCodec:
    """Half a codec that does not see a direction [D]."""
    return replace(half, analysis=half.analysis - (half.analysis @ direction)[..., None] * direction)


@pytest.mark.skipif("amx" not in instruction_sets(), reason="needs AMX")
@pytest.mark.parametrize("dim", [32, 96, 128, 256])
@pytest.mark.parametrize("group", range(1, 9))
def test_few_rows_with_amx_give_the_bits_of_avx512(group, dim):
    one, other = CpuEngine("amx"), CpuEngine("avx512")
    step = make_step(Case(((1, 700), (1, 65), (1, 1)), group=group, dim=dim, block=64, window=16)).store(other)
    assert torch.equal(step.attend(one), step.attend(other))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(
    "case",
    [
        *(Case(((150, 150), (50, 700)), group=3, dim=64, block=64, rotary=rotary, window=9) for rotary in ROTARIES),
        *(Case(((40, 620), (300, 300)), heads=1, group=4, dim=dim, block=64) for dim in (32, 40, 96, 128, 256)),
        # Rows of several blocks, whole and in pairs of groups of sixteen and not; widths that leave latents out, or all.
        Case(((1100, 1300),), heads=1, group=1, dim=64, block=128, window=32, window_block=16),
        Case(((130, 1500), (145, 1100), (160, 513)), group=1, dim=64, block=48, widths=(0, 1, 5)),
        Case(((200, 600),), group=1, widths=(0,)),
        Case(((300, 300),), group=2, dim=64, window=32, whole_chunk=True),
    ],
    ids=str,
)
def test_prompts_of_bfloat16_models_read_what_the_codec_restores(isa, case):
    case = replace(case, dtype=torch.bfloat16)
    check_attention(CpuEngine(isa), case)
    check_poison(CpuEngine(isa), case)


@pytest.mark.parametrize("isa", instruction_sets())
def test_latents_that_float32_cannot_tell_from_a_threshold_get_the_references_codes(isa):
    random = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=random), dim=0)
    codec = make_codec(2, 64, rotary="none")
    codec = replace(codec, key=without(codec.key, direction), value=without(codec.value, direction))
    tokens, positions = torch.randn(2, 1000, 2, 64, generator=random), torch.arange(1000)
    tokens += 30_000 * direction
    odd = torch.tensor([1e30, 1e19, 1e-22, 0, torch.inf, -torch.inf, torch.nan])
    tokens[:, 1 : 1 + len(odd)] *= odd[:, None, None]
    residual = tokens[0] - codec.offset("key", positions)
    latents = torch.einsum("thd,hrd->hrt", residual, codec.key.analysis)[..., 10:].flatten(0, 1).contiguous()
    in_float32 = torch.searchsorted(codec.thresholds[: len(latents)], latents)
    assert (in_float32 != codec.encode(*tokens, positions).T[: len(latents), 10:]).sum() > 50
    pages = torch.zeros(2, 1, codec.layout.token_bytes, 1008, dtype=torch.uint8)
    for engine, page in zip((CpuEngine(isa), reference), pages, strict=True):
        engine.write(codec, *tokens, positions, positions, page)
    assert int((pages[0] != pages[1]).sum()) == 0


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

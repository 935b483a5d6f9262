"""What a step tells the layers: positions and window slots, at addresses that stay, without waiting for a device."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from tests.cases import Case, NoHostReads, make_step
from vllm_kvsplice.engines import ENGINES, reference
from vllm_kvsplice.serving import backend
from vllm_kvsplice.serving.backend import KVSpliceMetadataBuilder, positions_of
from vllm_kvsplice.serving.window import WindowMetadataBuilder
from vllm_kvsplice.serving.window_blocks import WindowSpec

SPEC = WindowSpec(
    block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=6, hit_alignment=16, drafts=0
)


def config(engine: str = "reference") -> SimpleNamespace:
    scheduler = SimpleNamespace(max_num_batched_tokens=64)
    return SimpleNamespace(additional_config={"kvsplice": {"engine": engine}}, scheduler_config=scheduler)


def common(queries: list[int], lengths: list[int], padding: int = 0) -> CommonAttentionMetadata:
    """A step as vLLM describes it; `padding` tokens belong to no sequence."""
    start = torch.tensor([0, *queries]).cumsum(0).int()
    tokens = sum(queries) + padding
    slots = torch.arange(tokens) + 2
    slots[tokens - padding :] = -1
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor(lengths).int(),
        num_reqs=len(queries),
        num_actual_tokens=tokens,
        max_query_len=max(queries),
        max_seq_len=max(lengths),
        block_table_tensor=torch.zeros(len(queries), 16, dtype=torch.int32),
        slot_mapping=slots,
    )


@pytest.fixture
def builder(monkeypatch) -> KVSpliceMetadataBuilder:
    monkeypatch.setattr(backend, "_announce", lambda *_: None)
    return KVSpliceMetadataBuilder(SPEC, ["layer"], config(), torch.device("cpu"))


@pytest.mark.parametrize("padding", [0, 3])
def test_positions_end_at_each_sequences_length(padding):
    queries, lengths = [1, 5, 0, 2, 0], [9, 5, 0, 40, 0]
    expected = [at for n, length in zip(queries, lengths, strict=True) for at in range(length - n, length)]
    found = positions_of(common(queries, lengths, padding))
    assert found.dtype == torch.int64
    assert found.tolist()[: len(expected)] == expected
    assert len(found) == len(expected) + padding


def test_steps_of_single_tokens_are_described_without_host_reads_and_at_the_same_addresses(builder):
    window = WindowMetadataBuilder(SPEC, ["layer.window"], config(), torch.device("cpu"))
    seen = []
    for lengths in ([3, 9], [30, 1], [7, 7]):
        with NoHostReads():
            step = common([1, 1], lengths, padding=2)
            positions, slots = builder.build(0, step).positions, window.build(0, step).slots
        assert positions.tolist()[:2] == [n - 1 for n in lengths]
        # Block 0, here slots 0 to 3, is nobody's.
        assert slots.tolist() == [-1, -1, -1, -1]
        seen.append((positions.data_ptr(), slots.data_ptr()))
    assert len(set(seen)) == 1


def test_single_tokens_and_prompts_are_attended_to_apart_and_as_together(monkeypatch):
    monkeypatch.setattr(backend, "_announce", lambda *_: None)
    monkeypatch.setitem(ENGINES, "triton", ENGINES["reference"])
    whole = make_step(Case(((1, 9), (1, 30), (5, 40), (7, 7)), window=6)).store(reference)
    step = common([1, 1, 5, 7], [9, 30, 40, 7])
    step.block_table_tensor = whole.batch.block_table
    settings = config("triton")
    settings.speculative_config, settings.parallel_config = None, SimpleNamespace(decode_context_parallel_size=1)
    builder = KVSpliceMetadataBuilder(SPEC, ["layer"], settings, torch.device("cpu"))
    first, second = builder.build(0, step).parts
    assert (first.tokens, second.tokens) == (slice(2), slice(2, None))
    assert second.batch.query_start.tolist() == [0, 5, 12]
    outputs = []
    for part in (first, second):
        window = replace(whole.window, block_table=whole.window.block_table[part.sequences])
        query = whole.query[part.tokens]
        outputs.append(reference.attend(whole.codec, query, whole.pages, part.batch, whole.scale, window))
    assert torch.equal(torch.cat(outputs), whole.attend(reference))
    assert not builder.build(0, common([1, 1], [9, 30])).parts
    assert not builder.build(0, common([5, 7], [9, 30])).parts


def test_other_engines_than_the_gpus_attend_to_a_step_at_once(builder):
    assert not builder.build(0, common([1, 5], [9, 30])).parts


def test_layers_share_one_steps_metadata(builder):
    step = common([2], [5])
    other = KVSpliceMetadataBuilder(SPEC, ["other"], config(), torch.device("cpu"))
    assert builder.build(0, step) is other.build(0, step)
    assert builder.build(0, common([2], [5])) is not builder.build(0, step)


def test_graphs_are_captured_with_the_gpu_engine_alone(monkeypatch):
    assert KVSpliceMetadataBuilder.get_cudagraph_support(config(), SPEC) == AttentionCGSupport.NEVER
    monkeypatch.setitem(ENGINES, "triton", ENGINES["reference"])
    for builder in (KVSpliceMetadataBuilder, WindowMetadataBuilder):
        support = builder.get_cudagraph_support(config("triton"), SPEC)
        assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

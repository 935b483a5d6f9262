"""`KVSpliceCache` computes what evaluation computes, in whatever steps, and may be treated like a `DynamicCache`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from calibration.attention import Reading, tapped
from calibration.evaluate import compressing_tap
from tests.huggingface.agreement import agree
from tests.huggingface.conftest import Tiny
from tests.models import FAMILIES
from vllm_kvsplice.artifact import make_artifact
from vllm_kvsplice.errors import ArtifactError, KVSpliceError
from vllm_kvsplice.huggingface import KVSpliceCache
from vllm_kvsplice.huggingface.attention import attend
from vllm_kvsplice.huggingface.layer import CompressedLayer

WINDOW = 20


def new_cache(tiny: Tiny, window: int = WINDOW, **options: Any) -> KVSpliceCache:
    return KVSpliceCache(tiny.artifact, tiny.model.config, window, **options)


@torch.no_grad()
def read(tiny: Tiny, cache: Any, *steps: Tensor, **inputs: Any) -> Tensor:
    """Logits of token ids that are fed one step after the other."""
    return torch.cat([tiny.model(step, past_key_values=cache, **inputs).logits for step in steps], 1)


@torch.no_grad()
def evaluated(tiny: Tiny, tokens: Tensor, window: int = WINDOW) -> Tensor:
    """Logits by the path that `kvsplice eval` takes, which has no cache at all."""
    with tapped(tiny.model, compressing_tap(tiny.artifact.codecs, "serving"), Reading(window)):
        return tiny.model(tokens, use_cache=False).logits


class TestEveryFamily:
    @pytest.fixture(params=FAMILIES)
    def family(self, request, tiny: Callable[[str], Tiny]) -> Tiny:
        return tiny(request.param)

    @pytest.mark.parametrize("window", [0, 1, WINDOW, 1000])
    def test_logits_are_those_of_evaluation(self, family: Tiny, window: int) -> None:
        expected = evaluated(family, family.tokens, window)
        assert agree(read(family, new_cache(family, window), family.tokens), expected)
        plain = read(family, DynamicCache(config=family.model.config), family.tokens)
        assert (window == 1000) == agree(plain, expected)

    @pytest.mark.parametrize("window", [0, WINDOW])
    def test_chunks_equal_the_whole(self, family: Tiny, window: int) -> None:
        chunks = family.tokens.split([1, 1, 18, 1, 40, 3, 1, 31], 1)
        chunked = read(family, new_cache(family, window), *chunks)
        assert agree(chunked, evaluated(family, family.tokens, window))

    def test_generated_tokens_are_those_without_a_cache(self, family: Tiny) -> None:
        assert torch.equal(generated(family, new_cache(family)), generated_without_cache(family))

    def test_padded_rows_equal_rows_alone(self, family: Tiny) -> None:
        lengths = (50, 7, 33)
        cache, rows = new_cache(family), [family.tokens[i, :n] for i, n in enumerate(lengths)]
        padded, mask = left_padded(rows)
        answers = generate(family, padded, cache, attention_mask=mask)[:, padded.shape[1] :]
        for row, answer in zip(rows, answers, strict=True):
            assert torch.equal(generate(family, row[None], new_cache(family))[0, len(row) :], answer)
        assert cache.get_seq_length() == padded.shape[1] + 15


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [rows, longest]."""
    longest = max(map(len, rows))
    padded = [torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows]
    mask = [torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows]
    return torch.stack(padded), torch.stack(mask)


def generate(tiny: Tiny, prompts: Tensor, cache: Any, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0, "do_sample": False} | options
    settings.setdefault("attention_mask", torch.ones_like(prompts))
    if cache is not None:
        settings["past_key_values"] = cache
    torch.manual_seed(0)
    return tiny.model.generate(prompts, **settings)


def generated(tiny: Tiny, cache: Any, **options: Any) -> Tensor:
    return generate(tiny, tiny.tokens[:2, :48], cache, **options)


def generated_without_cache(tiny: Tiny, **options: Any) -> Tensor:
    """The same by the path of evaluation, all of the text anew for every token."""
    with tapped(tiny.model, compressing_tap(tiny.artifact.codecs, "serving"), Reading(WINDOW)):
        return generated(tiny, None, use_cache=False, **options)


class TestGeneration:
    @pytest.mark.parametrize(
        "options",
        [{"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"do_sample": True, "num_return_sequences": 3}],
        ids=str,
    )
    def test_beams_and_samples_are_those_without_a_cache(self, llama: Tiny, options: dict[str, Any]) -> None:
        cache = new_cache(llama)
        tokens = generated(llama, cache, **options)
        assert torch.equal(tokens, generated_without_cache(llama, **options))
        # The last token is never read. That tokens differ from the uncompressed model's is chance.
        assert cache.get_seq_length() == tokens.shape[1] - 1

    def test_drafts_that_are_taken_back_leave_no_trace(self, llama: Tiny) -> None:
        prompt = llama.tokens[:1, :30].repeat(1, 2)
        drafted = generate(llama, prompt, new_cache(llama), prompt_lookup_num_tokens=4)
        assert torch.equal(drafted, generate(llama, prompt, new_cache(llama)))

    def test_a_prompt_may_be_read_in_chunks(self, llama: Tiny) -> None:
        assert torch.equal(generated(llama, new_cache(llama), prefill_chunk_size=13), generated_without_cache(llama))

    def test_a_conversation_goes_on_in_the_same_cache(self, llama: Tiny) -> None:
        cache = new_cache(llama)
        first = generated(llama, cache)
        turn = torch.cat((first, llama.tokens[:2, 60:80]), 1)
        assert torch.equal(generate(llama, turn, cache), generate(llama, turn, new_cache(llama)))

    def test_a_copy_of_a_prefix_is_independent_of_it(self, llama: Tiny) -> None:
        prefix, rest = llama.tokens.split([60, 36], 1)
        cache = new_cache(llama)
        read(llama, cache, prefix)
        expected = evaluated(llama, llama.tokens)[:, 60:]
        for _ in range(2):
            assert agree(read(llama, copy.deepcopy(cache), rest), expected)
        assert cache.get_seq_length() == 60

    def test_bfloat16_is_read_in_bfloat16(self, llama: Tiny) -> None:
        model = copy.deepcopy(llama.model).bfloat16()
        cache = KVSpliceCache(llama.artifact, model.config, WINDOW)
        with torch.no_grad():
            logits = model(llama.tokens, past_key_values=cache).logits
        assert logits.dtype == cache.layers[0].window.dtype == torch.bfloat16
        assert (logits.float() - evaluated(llama, llama.tokens)).abs().mean() < 0.05


class TestDynamicSemantics:
    """What happens to the batch and to the length happens to what the next step reads."""

    @pytest.fixture
    def begun(self, llama: Tiny) -> KVSpliceCache:
        cache = new_cache(llama)
        read(llama, cache, llama.tokens[:3, :60])
        return cache

    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ],
        ids=["reorder", "select", "repeat"],
    )
    def test_changes_of_the_batch(self, llama: Tiny, begun: KVSpliceCache, change: Callable, rows: list[int]) -> None:
        change(begun)
        given = read(llama, begun, llama.tokens[rows, 60:])
        assert agree(given, evaluated(llama, llama.tokens[rows])[:, 60:])

    @pytest.mark.parametrize("amount", [-15, 45])
    def test_crop_while_the_past_is_recorded(self, llama: Tiny, amount: int) -> None:
        cache = new_cache(llama)
        cache.activate_past_recording()
        read(llama, cache, llama.tokens[:, :60])
        cache.crop(amount)
        assert cache.get_seq_length() == 45
        assert cache.layers[0].window_tokens == WINDOW - 1
        assert agree(read(llama, cache, llama.tokens[:, 45:]), evaluated(llama, llama.tokens)[:, 45:])

    def test_crop_reads_as_stored_what_was_let_go(self, llama: Tiny, begun: KVSpliceCache) -> None:
        recorded = new_cache(llama)
        recorded.activate_past_recording()
        read(llama, recorded, llama.tokens[:3, :60])
        for cache in (begun, recorded):
            cache.crop(-15)
        # Of the 19 tokens before the 45th, four are left as they are where the past was not recorded.
        for layer in recorded.layers:
            layer.window = layer.window[..., 15:, :]
        given = read(llama, begun, llama.tokens[:3, 45:60])
        assert agree(given, read(llama, recorded, llama.tokens[:3, 45:60]))
        assert not agree(given, evaluated(llama, llama.tokens[:3, :60])[:, 45:])

    @pytest.mark.parametrize("amount", [0, 60, 1000])
    def test_crop_of_nothing(self, llama: Tiny, begun: KVSpliceCache, amount: int) -> None:
        begun.crop(amount)
        assert agree(read(llama, begun, llama.tokens[:3, 60:]), evaluated(llama, llama.tokens[:3])[:, 60:])

    def test_crop_of_more_than_there_is(self, llama: Tiny, begun: KVSpliceCache) -> None:
        begun.crop(-1000)
        assert begun.get_seq_length() == 0
        assert agree(read(llama, begun, llama.tokens[:3]), evaluated(llama, llama.tokens[:3]))

    def test_reset_is_a_new_beginning(self, llama: Tiny, begun: KVSpliceCache) -> None:
        begun.reset()
        assert (begun.get_seq_length(), begun.nbytes) == (0, 0)
        assert agree(read(llama, begun, llama.tokens), evaluated(llama, llama.tokens))

    def test_nothing_happens_to_an_empty_cache(self, llama: Tiny) -> None:
        cache = new_cache(llama)
        cache.crop(-1)
        cache.reset()
        cache.reorder_cache(torch.tensor([0]))
        assert cache.get_seq_length() == 0


class TestPadding:
    def test_positions_count_from_the_first_real_token(self, llama: Tiny) -> None:
        """As `generate` gives them; a row's logits are then those of the row alone."""
        rows = [llama.tokens[0, :50], llama.tokens[1, :31]]
        padded, mask = left_padded(rows)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = read(llama, new_cache(llama), padded, attention_mask=mask, position_ids=positions)
        for row, given in zip(rows, logits, strict=True):
            assert agree(given[-len(row) :], evaluated(llama, row[None])[0])

    def test_padding_between_turns_is_not_read(self, llama: Tiny) -> None:
        first, second = llama.tokens[:2, :40], [llama.tokens[0, 40:60], llama.tokens[1, 40:47]]
        cache = new_cache(llama)
        read(llama, cache, first)
        padded, mask = left_padded(second)
        mask = torch.cat((torch.ones_like(first), mask), 1)
        positions = (mask.cumsum(1) - 1)[:, 40:]
        logits = read(llama, cache, padded, attention_mask=mask, position_ids=positions)
        assert agree(logits[0], evaluated(llama, llama.tokens[:1, :60])[0, 40:])
        assert agree(logits[1, -7:], evaluated(llama, llama.tokens[1:2, :47])[0, 40:])


class TestMemory:
    @pytest.mark.parametrize("window", [0, WINDOW])
    def test_what_is_held_is_packed(self, llama: Tiny, window: int) -> None:
        cache, dense = new_cache(llama, window), DynamicCache(config=llama.model.config)
        for held in (cache, dense):
            read(llama, held, *llama.tokens.split([90, 1, 5], 1))
        batch, tokens = llama.tokens.shape
        shape = llama.artifact.manifest.model
        element = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
        positions = 4
        exact = max(0, window - 1) * element
        assert cache.nbytes == batch * (tokens * (llama.artifact.bytes_per_token + positions) + exact)
        assert sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers) == batch * tokens * element

    def test_layers_the_artifact_leaves_out_stay_dense(self, tiny: Callable[[str], Tiny]) -> None:
        kinds = [type(layer) for layer in new_cache(tiny("gemma3")).layers]
        assert kinds == [DynamicSlidingWindowLayer, CompressedLayer, CompressedLayer]

    def test_an_artifact_may_leave_any_layer_out(self, llama: Tiny) -> None:
        manifest, kept = llama.artifact.manifest, llama.artifact.compressed_layers[1:]
        tensors = {name: tensor[1:] if tensor.dim() > 1 else tensor for name, tensor in llama.artifact.tensors.items()}
        for kind in ("key", "value"):
            widths = [w for head in getattr(manifest.layers[0], kind) for w in head if w]
            tensors[f"{kind}.levels"] = tensors[f"{kind}.levels"][sum(1 << w for w in widths) :]
        layers = tuple(plan if index in kept else None for index, plan in enumerate(manifest.layers))
        fewer = llama._replace(artifact=make_artifact(manifest.model_copy(update={"layers": layers}), tensors))
        cache = new_cache(fewer)
        assert [type(layer) for layer in cache.layers] == [DynamicLayer, CompressedLayer, CompressedLayer]
        assert agree(read(fewer, cache, *fewer.tokens.split(32, 1)), evaluated(fewer, fewer.tokens))


class TestRefusals:
    def test_another_model(self, llama: Tiny, tiny: Callable[[str], Tiny]) -> None:
        with pytest.raises(ArtifactError, match="another model"):
            KVSpliceCache(llama.artifact, tiny("gpt2").model.config)

    def test_no_artifact(self, llama: Tiny) -> None:
        with pytest.raises(ArtifactError, match="kvsplice calibrate"):
            KVSpliceCache("no/where/at/all", llama.model.config)

    @pytest.mark.parametrize("options", [{"window": -1}, {"window": 1 << 30}, {"prune_values": 0}], ids=str)
    def test_numbers_out_of_range(self, llama: Tiny, options: dict[str, Any]) -> None:
        with pytest.raises(KVSpliceError, match=r"recent_window|prune_values"):
            new_cache(llama, **options)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_another_attention_function(self, llama: Tiny, attention: str) -> None:
        cache = new_cache(llama)
        llama.model.set_attn_implementation(attention)
        with pytest.raises(KVSpliceError, match="set_attn_implementation"):
            read(llama, cache, llama.tokens)

    def test_a_mask_of_numbers(self, llama: Tiny) -> None:
        with pytest.raises(KVSpliceError, match="booleans"):
            read(llama, new_cache(llama), llama.tokens, attention_mask=torch.zeros(4, 1, 96, 96))

    @pytest.mark.parametrize("argument", ["softcap", "s_aux"])
    def test_arguments_that_would_be_ignored(self, argument: str) -> None:
        with pytest.raises(KVSpliceError, match="does not support"):
            attend(None, torch.ones(1, 2, 3, 8), None, None, None, **{argument: 1.0})

    def test_an_attention_that_is_not_told_positions(self, llama: Tiny) -> None:
        step = torch.ones(1, 2, 3, 32)
        handed = new_cache(llama).update(step, step, 0)
        with pytest.raises(KVSpliceError, match="where tokens stand"):
            attend(None, torch.ones(1, 4, 3, 32), *handed, None)

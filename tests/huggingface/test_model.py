"""Three lines from a model to compressed generation, and a model that is afterwards as it was."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPTJConfig, GPTJForCausalLM

from calibration.pipeline import calibrate
from calibration.recipe import CalibrationConfig
from tests.huggingface.agreement import agree
from tests.huggingface.conftest import Tiny
from tests.huggingface.test_cache import evaluated, generate, new_cache
from tests.models import TEXT
from vllm_kvsplice.artifact import load_artifact
from vllm_kvsplice.errors import ArtifactError, KVSpliceError
from vllm_kvsplice.huggingface import CompressedKVModelWrapper, KVSpliceCache, calibrate_kv_compressor
from vllm_kvsplice.huggingface.attention import ATTENTION
from vllm_kvsplice.huggingface.pruning import PrunedLayer


class TestWrapper:
    @pytest.fixture
    def wrapped(self, llama: Tiny) -> CompressedKVModelWrapper:
        return CompressedKVModelWrapper(llama.model, llama.artifact, recent_window=20)

    def test_generate_is_the_models_own_with_a_compressed_cache(self, llama: Tiny, wrapped) -> None:
        prompt = llama.tokens[:2, :48]
        expected = generate(llama, prompt, new_cache(llama))
        assert torch.equal(generate(llama._replace(model=wrapped), prompt, None), expected)

    def test_forward_reads_what_evaluation_reads(self, llama: Tiny, wrapped) -> None:
        with torch.no_grad():
            for output in (wrapped(llama.tokens), wrapped.forward(input_ids=llama.tokens, use_cache=True)):
                assert agree(output.logits, evaluated(llama, llama.tokens))
        assert isinstance(output.past_key_values, KVSpliceCache)

    def test_a_cache_that_is_given_is_used(self, llama: Tiny, wrapped) -> None:
        cache, plain = wrapped.new_cache(), DynamicCache()
        for given in (cache, plain):
            wrapped(llama.tokens, past_key_values=given)
            assert given.get_seq_length() == llama.tokens.shape[1]

    def test_everything_else_is_the_models(self, llama: Tiny, wrapped) -> None:
        assert wrapped.config is llama.model.config
        assert wrapped.device == llama.model.device
        assert sum(p.numel() for p in wrapped.parameters()) == llama.model.num_parameters()
        with pytest.raises(AttributeError):
            _ = wrapped.no_such_thing

    def test_an_artifact_by_path_and_options_reach_the_cache(self, llama: Tiny) -> None:
        wrapped = CompressedKVModelWrapper(llama.model, llama.directory / "kvsplice", 7, prune_values=9)
        layer = wrapped.new_cache().layers[0]
        assert isinstance(layer, PrunedLayer)
        assert (layer.recent, layer.k) == (7, 9)

    def test_mistakes_show_at_once(self, llama: Tiny) -> None:
        with pytest.raises(ArtifactError, match="kvsplice calibrate"):
            CompressedKVModelWrapper(llama.model, "no/where/at/all")
        with pytest.raises(KVSpliceError, match="recent_window"):
            CompressedKVModelWrapper(llama.model, llama.artifact, recent_window=-1)


def test_the_lines_in_the_documentation_run(llama: Tiny) -> None:
    root = Path(__file__).parents[2]
    blocks = (root / "README.md").read_text().split("```python\n")[1:]
    example = next(block.partition("```")[0] for block in blocks if "calibrate_kv_compressor" in block)
    assert example in (root / "docs/huggingface.md").read_text()
    names = {"model": llama.model, "tokenizer": llama.tokenizer}
    exec(example, names)
    assert names["answer"].shape[1] > 4
    assert names["artifact"].bits_per_element <= 4


class TestCalibration:
    @pytest.fixture
    def recipe(self, tmp_path: Path) -> dict[str, object]:
        (tmp_path / "text.txt").write_text(TEXT)
        return {"bits": 3, "text": str(tmp_path / "text.txt"), "tokens": 1024, "context": 64}

    def test_from_a_model_in_memory_to_an_answer(self, llama: Tiny, recipe, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(llama.directory)
        artifact = calibrate_kv_compressor(model, llama.tokenizer, out=tmp_path / "out", **recipe)
        compressed = CompressedKVModelWrapper(model, artifact)
        answer = compressed.generate(llama.tokens[:1], max_new_tokens=4, do_sample=False)
        assert answer.shape[1] > llama.tokens.shape[1]
        assert load_artifact(tmp_path / "out").digest == artifact.digest
        assert artifact.manifest.provenance.model == llama.directory.name
        assert 2.5 < artifact.bits_per_element <= 3

    def test_it_is_the_artifact_that_the_command_makes(self, llama: Tiny, recipe, tmp_path: Path, monkeypatch) -> None:
        # The command measures in bfloat16 where the processor has it.
        monkeypatch.setattr("calibration.study.fast_dtype", lambda: torch.float32)
        made = calibrate(str(llama.directory), tmp_path / "out", CalibrationConfig(**recipe))
        for model in (str(llama.directory), AutoModelForCausalLM.from_pretrained(llama.directory)):
            artifact = calibrate_kv_compressor(model, **recipe)
            assert artifact.manifest.tensors_sha256 == made.manifest.tensors_sha256
            assert artifact.manifest.quality == made.manifest.quality

    def test_the_model_is_afterwards_as_it_was(self, llama: Tiny, recipe) -> None:
        model = AutoModelForCausalLM.from_pretrained(llama.directory, attn_implementation="eager").train()
        model.model.layers[1].eval()
        model.lm_head.weight.requires_grad_(False)
        before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
        calibrate_kv_compressor(model, llama.tokenizer, **recipe)
        after = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
        assert before == after
        assert all(parameter.grad is None for parameter in model.parameters())
        assert model.config._attn_implementation == "eager" != ATTENTION

    def test_a_tokenizer_that_cannot_be_found_is_asked_for(self, llama: Tiny, recipe) -> None:
        config = copy.deepcopy(llama.model.config)
        config.name_or_path = ""
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(KVSpliceError, match="came without a tokenizer"):
            calibrate_kv_compressor(model, **recipe)

    def test_a_model_with_attention_of_its_own_making_is_refused(self, llama: Tiny, recipe) -> None:
        config = GPTJConfig(vocab_size=512, n_embd=64, n_layer=1, n_head=2, n_positions=64, rotary_dim=16)
        with pytest.raises(KVSpliceError, match="attention interface"):
            calibrate_kv_compressor(GPTJForCausalLM(config), llama.tokenizer, **recipe)

    def test_a_setting_that_does_not_exist_is_named(self, llama: Tiny) -> None:
        with pytest.raises(KVSpliceError, match="setting bitz"):
            calibrate_kv_compressor(llama.model, llama.tokenizer, bitz=3)

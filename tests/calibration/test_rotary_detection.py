"""`rotary_of` finds the rotation a model really applies, or refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedModel

from calibration.attention import tapped
from calibration.models import load_model, rotary_of
from tests.models import FAMILIES, POSITIONS, tiny_model, tiny_tokenizer
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.rotary import Rotary

ROTATING = [name for name, family in FAMILIES.items() if family.pairs]
THETA = {"rope_theta": 10000.0}
LONGROPE = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 128}
LINEAR_SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}
# What a model may claim to rotate by instead of its own frequencies.
LIES = {
    "twice as fast": lambda inv_freq: inv_freq * 2,
    "in another order": lambda inv_freq: inv_freq.flip(0),
    "half of the pairs": lambda inv_freq: inv_freq[::2].clone(),
    "no slow pairs": lambda inv_freq: inv_freq * (inv_freq > 0.02),
}


def load(family: str, directory: Path, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    return load_model(str(tiny_model(family, directory, **overrides)), dtype)[0]


def worst_drift(model: PreTrainedModel, rotary: Rotary) -> float:
    """How far keys of one token, repeated at all positions, are from constant once the rotation is undone.

    Attention over equal values gives that value, so the keys of such a text are R(j) times one vector in every layer.
    """
    keys: dict[int, Tensor] = {}

    def keep(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys[layer] = key[0]
        return key, value

    with torch.no_grad(), tapped(model, keep):
        model(torch.full((1, POSITIONS), 300), use_cache=False)
    turned = {layer: rotary.at(layer) for layer in keys}
    plain = [r.unrotate(keys[i], torch.arange(POSITIONS)) if r else keys[i] for i, r in turned.items()]
    return max(float((x - x[:, :1]).norm(dim=-1).max() / x.norm(dim=-1).mean()) for x in plain)


@pytest.mark.parametrize("family", ROTATING)
def test_rotary_of_every_family_undoes_its_rotation_at_every_position(family, tmp_path):
    model = load(family, tmp_path)
    rotary = rotary_of(model)
    made = FAMILIES[family]
    assert (len(rotary.inv_freq), rotary.interleaved, rotary.skips) == (made.pairs, made.interleaved, made.unrotated)
    assert worst_drift(model, rotary) < 1e-3


@pytest.mark.parametrize("family", ["llama", "glm4", "stablelm"])
def test_rotary_is_found_in_bfloat16(family, tmp_path):
    rotary = rotary_of(load(family, tmp_path, torch.bfloat16))
    assert (len(rotary.inv_freq), rotary.interleaved) == (FAMILIES[family].pairs, FAMILIES[family].interleaved)


def test_learned_positions_are_no_rotation(tmp_path):
    assert rotary_of(load("gpt2", tmp_path)) is None


@pytest.mark.parametrize("kind", LINEAR_SCALINGS)
def test_scaled_frequencies_are_taken_as_they_are(kind, tmp_path):
    model = load("llama", tmp_path, rope_parameters={"rope_type": kind} | THETA | LINEAR_SCALINGS[kind])
    rotary = rotary_of(model)
    default = 10000.0 ** -(torch.arange(16) / 16)
    assert not torch.allclose(rotary.inv_freq, default)
    assert worst_drift(model, rotary) < 1e-3


@pytest.mark.parametrize(("kind", "settings"), [("dynamic", {"factor": 2.0}), ("longrope", LONGROPE)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rotation_that_depends_on_the_length_is_refused(family, kind, settings, tmp_path):
    parameters = {"rope_type": kind} | THETA | settings
    if family == "gemma3":
        parameters = {"full_attention": parameters, "sliding_attention": {"rope_type": "default"} | THETA}
    model = load(family, tmp_path, rope_parameters=parameters)
    with pytest.raises(KVSpliceError, match=f"{kind}.*length of the text"):
        rotary_of(model)


@pytest.mark.parametrize("lie", LIES)
def test_model_that_rotates_by_other_frequencies_than_it_names_is_refused(lie, tmp_path):
    model = load("llama", tmp_path)
    # The first `inv_freq` in the order of modules is the one a model is believed to use.
    model.inv_freq = LIES[lie](model.model.rotary_emb.inv_freq)
    with pytest.raises(KVSpliceError, match="does not rotate its keys"):
        rotary_of(model)


def test_layer_that_rotates_by_other_frequencies_than_the_rest_is_refused(tmp_path):
    model = load("llama", tmp_path)
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def conjugate(*args, position_embeddings, **options):
        cos, sin = position_embeddings
        return original(*args, position_embeddings=(cos, -sin), **options)

    attention.forward = conjugate
    with pytest.raises(KVSpliceError, match="layer 1 does not rotate"):
        rotary_of(model)


def test_rotation_that_no_layer_takes_part_in_is_none(tmp_path):
    # Its full-attention layers do not rotate, those with a window do.
    assert rotary_of(load("cohere2", tmp_path)) is None


def test_model_with_nothing_but_sliding_windows_is_refused(tmp_path):
    model = load("mistral", tmp_path, sliding_window=24)
    with pytest.raises(KVSpliceError, match="full-attention"):
        rotary_of(model)


def test_model_with_attention_of_its_own_making_is_refused_when_loaded(tmp_path):
    config = GPTJConfig(vocab_size=512, n_embd=64, n_layer=1, n_head=2, n_positions=64, rotary_dim=16)
    GPTJForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(KVSpliceError, match="attention interface"):
        load_model(str(tmp_path), torch.float32)


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "no such model"}', "not JSON"])
def test_directory_without_a_model_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(KVSpliceError, match=r"cannot load .* kvsplice model"):
        load_model(str(tmp_path), torch.float32)

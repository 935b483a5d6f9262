"""FIM metrics of whole models, and the hook for training, on tiny models."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from calibration.fim.attention import attention_spectra
from calibration.fim.callback import FimCallback, FimFollower
from calibration.fim.linear import attention_maps, map_metrics, weight_spectrum
from calibration.fim.measure import fim_run
from calibration.fim.runs import Run
from calibration.recipe import CalibrationConfig
from calibration.study import study
from tests.models import FAMILIES, TEXT, VOCAB, tiny_model

WINDOWS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


def plain_model(family: str, folder: Path, attention: str = "eager") -> PreTrainedModel:
    """As anybody loads it, not through `calibration.models`."""
    return AutoModelForCausalLM.from_pretrained(tiny_model(family, folder / "model"), attn_implementation=attention)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3"])
def test_attention_is_the_one_the_model_computes(family, tmp_path):
    model = plain_model(family, tmp_path).eval()
    with torch.no_grad():
        attentions = [model(w[None], output_attentions=True).attentions for w in WINDOWS]
    found = attention_spectra(model, WINDOWS, lambda: None)
    assert sorted(found) == [layer for layer in range(3) if layer not in FAMILIES[family].sliding]
    for layer, spectra in found.items():
        p = torch.stack([a[layer][0] for a in attentions]).double()
        mean = torch.diag_embed(p.sum((0, 2))) - torch.einsum("whqs,whqt->hst", p, p)
        expected = torch.linalg.eigvalsh(mean / WINDOWS.numel()).flip(-1)
        torch.testing.assert_close(spectra, expected, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("measured")
    (folder / "text.txt").write_text(TEXT)
    config = CalibrationConfig(text=str(folder / "text.txt"), tokens=1024, context=64)
    return fim_run(study(str(tiny_model("llama", folder / "model")), config), "tiny")


def test_every_head_has_every_metric(run):
    names = {"trace", "eigmax", "cond", "energy_r8", "energy_r16", "effective_rank", "df"}
    assert set(run.heads()) == {(layer, head) for layer in range(3) for head in range(4)}
    assert all(set(values) == names for values in run.heads().values())
    assert all(0 < values["trace"] < 1 for values in run.heads().values())
    variances = {f"activation_{name}" for name in ("df", "k90", "k95", "k99", "compression")}
    of_kinds = {f"{kind}_{name}" for kind in ("key", "value") for name in names | variances}
    assert set(run.heads("kvhead")) == {(layer, head) for layer in range(3) for head in range(2)}
    assert all(set(values) == of_kinds for values in run.heads("kvhead").values())


def test_spectra_belong_to_the_metrics(run):
    for (layer, head), values in run.heads("kvhead").items():
        for kind in ("key", "value"):
            spectrum = run.spectra[f"fisher/layer{layer}/kvhead{head}/{kind}_spectrum"]
            assert len(spectrum) == 32
            assert sum(spectrum) == pytest.approx(values[f"{kind}_trace"], rel=1e-4)
    assert len(run.spectra) == 3 * (4 + 2 * 2)


def test_the_run_says_what_it_is_of(run):
    origin = run.run_info.model_dump()
    assert origin["num_heads"] == 4
    assert origin["num_kv_heads"] == 2
    assert origin["text"] == "text.txt"
    assert run.metrics["fisher/trace_global_mean"] == pytest.approx(
        sum(values["trace"] for values in run.heads().values()) / 12
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_maps_inside_attention_are_measured_in_every_family(family, tmp_path):
    model = plain_model(family, tmp_path)
    found = map_metrics(model, WINDOWS, lambda: None)
    own = {"gpt2": ("c_attn", "c_proj"), "phi": ("q_proj", "k_proj", "v_proj", "dense")}
    maps = own.get(family, ("q_proj", "k_proj", "v_proj", "o_proj"))
    names = {
        f"layer{layer}/{name}_{kind}_k95" for layer in range(3) for name in maps for kind in ("weight", "activation")
    }
    assert {name for name in found if name.endswith("_k95")} == names


def test_maps_are_found_whatever_else_attention_is_called(tmp_path):
    config = GPTNeoXConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    found = dict(attention_maps(GPTNeoXForCausalLM(config)))
    assert set(found) == {"layer0/query_key_value", "layer0/dense"}


def test_activations_that_lie_in_a_plane_compress_and_their_weights_do_not(tmp_path):
    model = plain_model("llama", tmp_path)
    attention = model.model.layers[1].self_attn
    inputs: list[torch.Tensor] = []
    basis = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))

    def flatten(module, given):
        inputs.append(given[0])
        return (given[0] @ basis.mT @ basis / 128,)

    attention.k_proj.register_forward_pre_hook(flatten)
    found = map_metrics(model, WINDOWS, lambda: None)
    assert inputs
    assert found["layer1/k_proj_activation_k99"] <= 2
    assert found["layer1/k_proj_weight_k99"] > 50


def test_weight_spectrum_is_squared_singular_values():
    weight = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    for matrix in (weight, weight.mT):
        torch.testing.assert_close(weight_spectrum(matrix), torch.linalg.svdvals(weight.double()) ** 2)


class TestTraining:
    def test_a_loop_of_ones_own_is_followed(self, tmp_path):
        model = plain_model("llama", tmp_path, "sdpa").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        logged: list[dict[str, float]] = []
        follow = FimFollower(WINDOWS, every=2, log=logged.append)
        for step in range(5):
            loss = model(WINDOWS, labels=WINDOWS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            follow(model, step)
        assert [step for step, _ in follow.history] == [0, 2, 4]
        assert model.training
        assert model.config._attn_implementation == "sdpa"
        traces = [metrics["fim/trace_global_mean"] for metrics in logged]
        assert len(set(traces)) == 3
        assert {"fisher/layer2/head3/cond", "fim/efficiency_score"} <= set(logged[0])

    def test_measuring_changes_nothing_in_training(self, tmp_path):
        model = plain_model("llama", tmp_path, "sdpa").train()
        before = model(WINDOWS, labels=WINDOWS).loss
        FimFollower(WINDOWS, every=1)(model, 0)
        after = model(WINDOWS, labels=WINDOWS).loss
        assert torch.equal(before, after)
        after.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_the_trainer_has_the_scores_in_its_history(self, tmp_path):
        model, callback = plain_model("gpt2", tmp_path, "sdpa"), FimCallback(WINDOWS, every=2)
        options = TrainingArguments(str(tmp_path / "out"), max_steps=5, report_to=[], use_cpu=True, save_strategy="no")
        examples = [{"input_ids": window, "labels": window} for window in WINDOWS] * 8
        trainer = Trainer(model, options, train_dataset=examples, callbacks=[callback])
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "fim/trace_global_mean" in entry]
        assert [entry["step"] for entry in logged] == [0, 2, 4]
        assert len({entry["fim/trace_global_mean"] for entry in logged}) == 3

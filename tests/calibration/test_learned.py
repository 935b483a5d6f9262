"""Codecs that are trained: on stored samples, and on what a model says."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibration.evaluate import compressing_tap, evaluate
from calibration.fit import FITS, FittedCodec
from calibration.fit import finetune as training
from calibration.fit.coder import KindCoder
from calibration.fit.errors import head_errors
from calibration.fit.finetune import Schedule, finetune
from calibration.fit.trainable import TrainableCodec
from calibration.pipeline import calibrate, make
from calibration.planners.budget import plan_budget
from calibration.recipe import CalibrationConfig
from calibration.statistics import KindStatistics, Statistics
from calibration.study import Study, study
from tests.models import TEXT, tiny_model
from vllm_kvsplice.artifact import load_artifact
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP

STEPS = 120


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> CalibrationConfig:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return CalibrationConfig(bits=2, text=str(file), tokens=2048, context=64, finetune=True, steps=STEPS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def measured(model, recipe) -> Study:
    return study(str(model), recipe)


@pytest.fixture(scope="module")
def start(measured) -> FittedCodec:
    return measured.fit.codec(plan_budget(measured.fit.distortion, measured.budget_for(2)))


def train(
    measured: Study,
    start: FittedCodec,
    checkpoint: Path | None = None,
    progress: Callable[[], None] = lambda: None,
    **schedule: float,
) -> training.Finetuned:
    return finetune(
        measured.model,
        start,
        measured.layers,
        measured.rotary,
        measured.training,
        measured.held_out.finetune,
        Schedule(**{"steps": STEPS, "rate": 5e-4, **schedule}),
        progress,
        checkpoint,
    )


@pytest.fixture(scope="module")
def trained(measured, start) -> training.Finetuned:
    return train(measured, start)


def same(one: FittedCodec, other: FittedCodec) -> bool:
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


class TestTrainable:
    def test_reads_what_the_codec_of_the_artifact_reads(self, measured, start):
        artifact = measured.artifact_of(start)
        reading = compressing_tap(artifact.codecs, "all")
        trainable = TrainableCodec(start, measured.layers, measured.rotary)
        generator = torch.Generator().manual_seed(0)
        for layer in measured.layers:
            key, value = torch.randn(2, 1, 2, 50, 32, generator=generator)
            for ours, read in zip(trainable(layer, key, value), reading(layer, key, value), strict=True):
                # A latent on a threshold may fall on either side of it in float32.
                differs = (ours - read).abs().amax(-1) > 1e-4
                assert differs.float().mean() < 0.01
                assert torch.equal(ours[:, :, 0], read[:, :, 0])

    def test_gives_back_what_it_started_from(self, measured, start):
        assert same(TrainableCodec(start, measured.layers, measured.rotary).fitted(), start)

    def test_gradients_pass_through_the_quantiser_to_every_parameter(self, measured, start):
        trainable = TrainableCodec(start, measured.layers, measured.rotary)
        key, value = torch.randn(2, 1, 2, 50, 32, generator=torch.Generator().manual_seed(0))
        sum(x.square().sum() for x in trainable(measured.layers[0], key, value)).backward()
        for kind in trainable.layers[0]:
            assert all(parameter.grad.abs().max() > 0 for parameter in kind.parameters())

    def test_layers_without_a_codec_are_left_alone(self, measured, start):
        key, value = torch.randn(2, 1, 2, 5, 32)
        assert TrainableCodec(start, measured.layers, measured.rotary)(99, key, value) == (key, value)


def mixed_uniform(seed: int) -> KindStatistics:
    """Independent uniform sources, mixed: the KLT finds sums of them, which are rounder and dearer to code."""
    generator = torch.Generator().manual_seed(seed)
    residual = (torch.rand(1, 2, 4000, 16, generator=generator) - 0.5) @ torch.randn(1, 2, 16, 16, generator=generator)
    return KindStatistics(
        mean=torch.zeros(1, 2, 16),
        fisher=torch.eye(16).expand(1, 2, 16, 16),
        residual=residual.half(),
        weight=torch.ones(1, 2, 4000),
        sink=residual[:, :, :64],
    )


def read_back(coder: KindCoder, residual: Tensor) -> Tensor:
    """Residuals [L, H, n, D] as they are read back, by definition: nearest levels, one group at a time."""
    latents = coder.analysis @ residual.mT / coder.unit[..., None]
    read = torch.zeros_like(latents)
    for place in torch.cartesian_prod(*map(torch.arange, coder.widths.shape)):
        layer, head, group = place.tolist()
        rows, book = slice(GROUP * group, GROUP * (group + 1)), coder.levels[layer, head, group]
        nearest = (latents[layer, head, rows, :, None] - book).abs().argmin(-1)
        read[layer, head, rows] = book[nearest] if coder.widths[layer, head, group] else 0.0
    return (coder.synthesis @ (read * coder.unit[..., None])).mT


def reading_cost(coder: KindCoder, start: KindCoder, statistics: KindStatistics) -> Tensor:
    """What that costs in the latents of `start`: errors squared, and twice more their part along the latent, [L, H]."""
    residual = statistics.residual.float()
    latents, error = start.analysis @ residual.mT, start.analysis @ (read_back(coder, residual) - residual).mT
    along = (error * latents).mean(-1).square() / latents.square().mean(-1)
    return ((error.square().mean(-1) + 2 * along) * start.importance).sum(-1)


class TestReconstruction:
    @pytest.mark.parametrize("fit", ["kvsplice", "kvsplice_spline", "kvsplice_uniform"])
    def test_reads_back_more_than_the_closed_form_and_of_no_head_less(self, fit):
        statistics = Statistics((0,), mixed_uniform(0), mixed_uniform(1), torch.arange(4000), 4000)
        learned = FITS[fit](statistics)
        plan = plan_budget(learned.distortion, 16)
        start = learned.start(plan)
        before, after = (
            torch.stack(
                [
                    reading_cost(codec.key, start.key, statistics.key),
                    reading_cost(codec.value, start.value, statistics.value),
                ]
            )
            for codec in (start, learned.codec(plan))
        )
        # A head that is no better on samples kept aside stays as it was.
        assert (after <= before * 1.002).all()
        assert after.sum() < 0.98 * before.sum()


class TestFinetuning:
    def test_model_says_more_nearly_what_it_says_uncompressed(self, measured, start, trained):
        assert trained.kl_after < 0.98 * trained.kl_before
        assert divergence(measured, trained.codec) < divergence(measured, start)

    def test_widths_codebooks_and_sinks_stay(self, start, trained):
        for before, after in ((start.key, trained.codec.key), (start.value, trained.codec.value)):
            assert all(
                torch.equal(getattr(before, name), getattr(after, name)) for name in ("widths", "levels", "unit")
            )
            assert not torch.equal(before.analysis, after.analysis)

    def test_same_seed_same_codec(self, measured, start, trained):
        assert same(train(measured, start).codec, trained.codec)
        assert not same(train(measured, start, seed=1).codec, trained.codec)

    def test_interrupted_training_ends_as_if_it_never_was(self, measured, start, trained, tmp_path):
        checkpoint = tmp_path / "training"
        with pytest.raises(KeyboardInterrupt):
            train(measured, start, checkpoint, interrupt_after(STEPS * 2 // 3))
        assert checkpoint.exists()
        resumed = train(measured, start, checkpoint)
        assert same(resumed.codec, trained.codec)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("left", ["of another training", "not a checkpoint"])
    def test_checkpoint_that_does_not_belong_here_is_not_used(self, left, measured, start, trained, tmp_path):
        checkpoint = tmp_path / "training"
        if left == "of another training":
            with pytest.raises(KeyboardInterrupt):
                train(measured, start, checkpoint, interrupt_after(STEPS // 2), seed=5)
        else:
            checkpoint.write_bytes(b"nothing of the sort")
        assert same(train(measured, start, checkpoint).codec, trained.codec)

    def test_training_that_makes_things_worse_gives_back_what_it_began_with(self, measured, start):
        calls = []
        ruined = train(measured, start, progress=lambda: calls.append(1), rate=1e4)
        assert ruined.kl_after == ruined.kl_before
        assert same(ruined.codec, start)
        # Three judgements in vain, one every fourth of the steps.
        assert len(calls) == STEPS * 3 // 4


def interrupt_after(count: int) -> Callable[[], None]:
    left = iter(range(count))

    def progress() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


def divergence(measured: Study, codec: FittedCodec) -> float:
    """On text that training did not see, through the artifact."""
    tap = compressing_tap(measured.artifact_of(codec).codecs, "all")
    return evaluate(measured.model, tap, measured.held_out.quality).divergence


class TestErrors:
    def test_are_those_of_reading_back(self, measured, start):
        errors = head_errors(measured.artifact_of(start), measured.statistics)
        assert len(errors) == 2 * 3 * 2
        rows = errors[(errors["kind"] == "value") & (errors["layer"] == 1)]
        kind = measured.statistics.value
        residual = kind.residual.float()
        error = read_back(start.value, residual)[1] - residual[1]
        lost = error.square().sum((1, 2)) / residual[1].square().sum((1, 2))
        torch.testing.assert_close(torch.tensor(rows["explained_variance"].tolist()), 1 - lost, atol=0.03, rtol=0)
        assert (errors["relative_error"] > 0).all()

    def test_more_bits_lose_less(self, measured):
        lost = []
        for bits in (2, 4, 8):
            plan = plan_budget(measured.fit.distortion, measured.budget_for(bits))
            lost.append(head_errors(measured.artifact(plan), measured.statistics)["relative_error"].mean())
        assert lost == sorted(lost, reverse=True)

    def test_a_head_that_says_nothing_is_no_fault(self, measured, start):
        silent, statistics = deepcopy((measured.artifact_of(start), measured.statistics))
        for tensor in (statistics.value.mean, statistics.value.residual, silent.tensors["value.mean"]):
            tensor[1, 0] = 0
        silent.tensors["value.synthesis"][1, 0] = 0
        errors = head_errors(silent, statistics)
        assert (errors["relative_error"] == 0).sum() == 1

    def test_numbers_that_are_not_finite_are_caught(self, measured, start):
        broken = measured.artifact_of(start)
        broken.tensors["value.synthesis"][1, 0, 0] = torch.nan
        with pytest.raises(KVSpliceError, match="not finite"):
            head_errors(broken, measured.statistics)


def test_calibrate_trains_and_says_so(model, recipe, tmp_path):
    errors = tmp_path / "errors.csv"
    spline = recipe.model_copy(update={"fit": "kvsplice_spline"})
    calibrate(str(model), tmp_path / "out", spline, errors_file=errors)
    artifact = load_artifact(tmp_path / "out")
    assert artifact.manifest.provenance.fit == f"kvsplice_spline, finetuned in {STEPS} steps"
    header, *rows = errors.read_text().splitlines()
    assert header.split(",")[:4] == ["layer", "head", "kind", "bits"]
    assert len(rows) == 2 * 3 * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.csv", "out"]


def test_an_artifact_names_the_algorithms_of_its_plan(model, recipe, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"bits": 3, "per_layer_head": {"0/1": {"algo": "kvsplice"}}}))
    settings = recipe.model_dump(exclude={"bits", "finetune", "steps"}, exclude_none=True) | {
        "planner": "manual",
        "plan": file,
    }
    made = make(str(model), CalibrationConfig(**settings))
    assert made.manifest.provenance.fit == "pca and kvsplice"

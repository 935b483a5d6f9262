"""`calibrate` from a model to an artifact on disk, for every family of models."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from calibration import study
from calibration.attention import AS_STORED, Reading, tapped
from calibration.evaluate import compressing_tap, evaluate
from calibration.models import load_model
from calibration.pipeline import calibrate
from calibration.recipe import CalibrationConfig, read_config
from calibration.text import token_windows
from tests.models import FAMILIES, TEXT, tiny_model, tiny_tokenizer
from vllm_kvsplice.artifact import Artifact, load_artifact
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import TOKEN_ALIGNMENT

BITS = (8.0, 4.0, 2.0)


class Calibrated(NamedTuple):
    """A tiny model, its artifacts by bits, and the file of measurements that they share."""

    family: str
    model: Path
    artifacts: dict[float, Artifact]
    statistics: Path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def recipe(text) -> CalibrationConfig:
    return CalibrationConfig(bits=4, text=str(text), tokens=512, context=64)


@pytest.fixture(scope="module", params=FAMILIES)
def calibrated(request, text, tmp_path_factory) -> Calibrated:
    folder = tmp_path_factory.mktemp(request.param)
    model, statistics = tiny_model(request.param, folder / "model"), folder / "statistics.safetensors"
    artifacts = {}
    for bits in BITS:
        config = CalibrationConfig(bits=bits, text=str(text), tokens=1024, context=64)
        calibrate(str(model), folder / f"{bits:g}", config, statistics)
        artifacts[bits] = load_artifact(folder / f"{bits:g}")
    return Calibrated(request.param, model, artifacts, statistics)


@pytest.fixture
def llama(tmp_path) -> Path:
    return tiny_model("llama", tmp_path / "model")


@torch.no_grad()
def logits(model_directory: Path, tap=None) -> Tensor:
    """Logits of text that calibration never saw, float32 [4, 96, V]."""
    model, tokenizer = load_model(str(model_directory), torch.float32)
    windows = token_windows(tokenizer, TEXT[-4000:], 4, 96)
    with tapped(model, tap or (lambda _, key, value: (key, value))):
        return model(windows, use_cache=False).logits


def deaf(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Every token reads the same: what a cache that remembers nothing but means would give."""
    return key, value.mean(2, keepdim=True).expand_as(value)


class TestEveryFamily:
    def test_quality_of_eight_bits_is_that_of_the_model(self, calibrated):
        quality = calibrated.artifacts[8.0].manifest.quality
        assert abs(quality.change_percent) < 2
        assert quality.tokens == study.QUALITY_WINDOWS * 63
        assert (quality.mode, quality.context) == ("all", 64)

    def test_logits_come_closer_with_every_bit(self, calibrated):
        exact = logits(calibrated.model)
        errors = [float((logits(calibrated.model, deaf) - exact).norm())]
        for bits in reversed(BITS):
            tap = compressing_tap(calibrated.artifacts[bits].codecs, "serving")
            errors.append(float((logits(calibrated.model, tap) - exact).norm()))
        # Nothing remembered, then 2, 4 and 8 bits. A Gaussian loses 6 dB with every bit, an outlier less.
        assert errors == sorted(errors, reverse=True)
        # Eight bits are a uniform quantiser, and these latents have outliers.
        assert errors[-1] < 0.06 * errors[0]

    @pytest.mark.parametrize("bits", BITS)
    def test_bits_asked_for_are_spent_to_within_16_bytes(self, calibrated, bits):
        artifact = calibrated.artifacts[bits]
        shape, sizes = artifact.manifest.model, [p.layout.token_bytes for p in artifact.manifest.layers if p]
        elements = 2 * shape.num_kv_heads * shape.head_dim
        wanted = bits / 8 * elements * len(sizes)
        assert wanted - TOKEN_ALIGNMENT < sum(sizes) <= wanted
        # Dense layers count as 16 bits.
        dense = shape.num_layers - len(sizes)
        assert artifact.bytes_per_token == sum(sizes) + dense * elements * 2
        assert artifact.bits_per_element == pytest.approx(8 * artifact.bytes_per_token / elements / shape.num_layers)

    def test_layers_with_a_sliding_window_stay_dense(self, calibrated):
        for artifact in calibrated.artifacts.values():
            dense = [i for i, plan in enumerate(artifact.manifest.layers) if plan is None]
            assert tuple(dense) == FAMILIES[calibrated.family].sliding

    def test_artifact_belongs_to_its_model_and_says_how_it_came_to_be(self, calibrated):
        artifact = calibrated.artifacts[4.0]
        model, _ = load_model(str(calibrated.model), torch.float32)
        artifact.check_model(model.config)
        origin = artifact.manifest.provenance
        assert (origin.model, origin.text, origin.fit) == ("model", "text.txt", "pca")
        assert (origin.tokens, origin.context, origin.seed, origin.requested) == (1024, 64, 0, "4 bits")
        family, rotary = FAMILIES[calibrated.family], artifact.manifest.rotary
        assert (rotary.pairs if rotary else 0) == family.pairs
        assert (rotary.interleaved if rotary else False) == family.interleaved
        assert (rotary.skips if rotary else ()) == family.unrotated

    def test_modes_differ_by_position_0_alone(self, calibrated):
        model, tokenizer = load_model(str(calibrated.model), torch.float32)
        window = token_windows(tokenizer, TEXT[-4000:], 1, 48)
        seen: dict[str, dict[int, tuple[Tensor, Tensor]]] = {"exact": {}, "all": {}, "serving": {}}
        taps = {mode: compressing_tap(calibrated.artifacts[4.0].codecs, mode) for mode in ("all", "serving")}

        def watch(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            seen["exact"][layer] = (key, value)
            for mode, tap in taps.items():
                seen[mode][layer] = tap(layer, key, value)
            return key, value

        with torch.no_grad(), tapped(model, watch):
            model(window, use_cache=False)
        for layer in calibrated.artifacts[4.0].compressed_layers:
            for exact, whole, served in zip(*(seen[mode][layer] for mode in ("exact", "all", "serving")), strict=True):
                assert torch.equal(whole[:, :, 1:], served[:, :, 1:])
                assert torch.equal(whole[:, :, 0], exact[:, :, 0])
                assert not torch.equal(served[:, :, 0], exact[:, :, 0])
                assert not torch.equal(whole[:, :, 1:], exact[:, :, 1:])

    def test_perplexity_is_the_exponential_of_the_mean_loss(self, calibrated):
        model, tokenizer = load_model(str(calibrated.model), torch.float32)
        windows = token_windows(tokenizer, TEXT[-4000:], 3, 40)
        calls = []
        result = evaluate(
            model, compressing_tap(calibrated.artifacts[4.0].codecs, "all"), windows, lambda: calls.append(1)
        )
        with torch.no_grad():
            probabilities = model(windows, use_cache=False).logits[:, :-1].log_softmax(-1)
        told = probabilities.gather(-1, windows[:, 1:, None])
        assert result.baseline_ppl == pytest.approx(float(torch.exp(-told.mean())), rel=1e-4)
        assert (result.tokens, len(calls)) == (told.numel(), 3)
        assert result.change_percent == pytest.approx(100 * (result.ppl - result.baseline_ppl) / result.baseline_ppl)
        # Without codecs nothing is compressed.
        dense = evaluate(model, compressing_tap({}, "all"), windows)
        assert (dense.change_percent, dense.divergence) == pytest.approx((0, 0), abs=1e-4)

    def test_divergence_is_that_of_all_predictions_by_bits(self, calibrated):
        model, tokenizer = load_model(str(calibrated.model), torch.float32)
        windows = token_windows(tokenizer, TEXT[-4000:], 2, 40)
        tap = compressing_tap(calibrated.artifacts[2.0].codecs, "all")
        divergence = evaluate(model, tap, windows).divergence
        with torch.no_grad():
            exact = model(windows, use_cache=False).logits[:, :-1].double().softmax(-1)
            said = []
            for window in windows:
                with tapped(model, tap):
                    said.append(model(window[None], use_cache=False).logits[0, :-1].double().softmax(-1))
        assert divergence == pytest.approx(float((exact * (exact / torch.stack(said)).log()).sum(-1).mean()), rel=1e-3)
        assert (
            divergence
            > 2 * evaluate(model, compressing_tap(calibrated.artifacts[4.0].codecs, "all"), windows).divergence
        )

    def test_tokens_that_a_model_rules_out_have_no_part_in_the_divergence(self, calibrated):
        model, tokenizer = load_model(str(calibrated.model), torch.float32)
        windows = token_windows(tokenizer, TEXT[-4000:], 2, 40)
        tap = compressing_tap(calibrated.artifacts[2.0].codecs, "all")
        forbidden = min(set(range(model.config.get_text_config().vocab_size)) - set(windows.flatten().tolist()))

        def rule_out(_module, _inputs, output):
            output.logits[..., forbidden] = -torch.inf

        hook = model.register_forward_hook(rule_out)
        result = evaluate(model, tap, windows)
        hook.remove()
        assert result.divergence == pytest.approx(evaluate(model, tap, windows).divergence, rel=0.1)

    def test_window_of_the_whole_context_is_dense_and_none_is_the_pure_codec(self, calibrated):
        model, tokenizer = load_model(str(calibrated.model), torch.float32)
        windows = token_windows(tokenizer, TEXT[-4000:], 2, 48)

        def change(reading: Reading) -> float:
            return abs(evaluate(model, tap, windows, reading=reading).change_percent)

        tap = compressing_tap(calibrated.artifacts[2.0].codecs, "serving")
        pure, narrow, whole = (change(Reading(recent)) for recent in (0, 40, 48))
        assert pure == change(AS_STORED)
        assert whole == pytest.approx(0, abs=1e-4)
        assert narrow > 1e-4

    def test_exact_prompt_is_judged_on_what_follows_it(self, calibrated):
        model, tokenizer = load_model(str(calibrated.model), torch.float32)
        windows = token_windows(tokenizer, TEXT[-4000:], 2, 48)
        tap = compressing_tap(calibrated.artifacts[2.0].codecs, "serving")
        result = evaluate(model, tap, windows, reading=Reading(prompt=47))
        assert result.tokens == 2
        with torch.no_grad():
            told = model(windows, use_cache=False).logits[:, 46].log_softmax(-1).gather(1, windows[:, 47:])
        assert result.baseline_ppl == pytest.approx(float(torch.exp(-told.mean())), rel=1e-4)
        # The prompt's last query predicts this token, and it reads everything exactly.
        assert result.change_percent == pytest.approx(0, abs=1e-4)
        assert abs(evaluate(model, tap, windows, reading=Reading(prompt=40)).change_percent) > 1e-4


class TestMeasurements:
    def test_second_calibration_at_other_bits_measures_nothing(self, llama, recipe, tmp_path, monkeypatch):
        kept = tmp_path / "statistics.safetensors"
        calibrate(str(llama), tmp_path / "4", recipe, kept)
        monkeypatch.setattr(study, "collect", refuse_to_measure)
        fewer = recipe.model_copy(update={"bits": 3.0})
        calibrate(str(llama), tmp_path / "3", fewer, kept)
        assert load_artifact(tmp_path / "3").bits_per_element == pytest.approx(3, abs=0.1)

    @pytest.mark.parametrize("change", [{"seed": 1}, {"tokens": 256}, {"context": 32}], ids=str)
    def test_measurements_on_other_terms_are_made_anew(self, change, llama, recipe, tmp_path, monkeypatch):
        kept = tmp_path / "statistics.safetensors"
        calibrate(str(llama), tmp_path / "4", recipe, kept)
        monkeypatch.setattr(study, "collect", refuse_to_measure)
        with pytest.raises(AssertionError, match="measured again"):
            calibrate(str(llama), tmp_path / "again", recipe.model_copy(update=change), kept)

    def test_kept_measurements_give_the_artifact_that_fresh_ones_give(self, llama, recipe, tmp_path):
        kept = tmp_path / "statistics.safetensors"
        made = [calibrate(str(llama), tmp_path / str(i), recipe, file) for i, file in enumerate((None, kept, kept))]
        assert len({artifact.manifest.tensors_sha256 for artifact in made}) == 1
        assert len({artifact.manifest.quality for artifact in made}) == 1


def refuse_to_measure(*args: object, **options: object) -> None:
    raise AssertionError("measured again")


class TestHeldOut:
    def test_quality_is_judged_on_the_same_text_whatever_else_judges(self, llama, recipe):
        windows = {}
        for changes in ({}, {"finetune": True}, {"bits": None, "max_ppl_increase": 1}):
            held_out = study.study(str(llama), recipe.model_copy(update=changes)).held_out
            windows[str(changes)] = held_out.quality
            others = torch.cat((held_out.search, held_out.finetune))
            assert len(others) == 2 * len(changes.keys() & {"finetune", "max_ppl_increase"})
            assert not (others[:, None] == held_out.quality).all(-1).any()
        first, *rest = windows.values()
        assert len(first) == study.QUALITY_WINDOWS
        assert all(torch.equal(first, other) for other in rest)


class TestBudget:
    # A token of a dense layer takes 256 bytes, of all compressed ones at most 128 each.
    @pytest.mark.parametrize(("family", "budget"), [("llama", 250), ("gemma3", 500)])
    def test_budget_in_bytes_pays_for_dense_layers_first(self, family, budget, recipe, tmp_path):
        model = tiny_model(family, tmp_path / "model")
        artifact = calibrate(str(model), tmp_path / "out", in_bytes(recipe, budget))
        assert budget - TOKEN_ALIGNMENT < artifact.bytes_per_token <= budget
        assert artifact.manifest.provenance.requested == f"{budget} bytes per token"

    @pytest.mark.parametrize("budget", [1, 40, 100_000])
    def test_impossible_budget_is_the_users_mistake(self, budget, llama, recipe, tmp_path):
        with pytest.raises(KVSpliceError, match="budget"):
            calibrate(str(llama), tmp_path / "out", in_bytes(recipe, budget))
        assert not (tmp_path / "out").exists()


def in_bytes(recipe: CalibrationConfig, budget: int) -> CalibrationConfig:
    return recipe.model_copy(update={"bits": None, "budget": budget})


def test_a_window_changes_what_is_fitted_and_is_told(llama, recipe, tmp_path):
    made = {}
    for recent in (0, 8):
        beside = recipe.model_copy(update={"recent": recent})
        made[recent] = calibrate(str(llama), tmp_path / "out", beside, tmp_path / "statistics.safetensors")
    # The measurements kept for one are not used for the other.
    assert not torch.allclose(made[0].tensors["value.analysis"], made[8].tensors["value.analysis"], rtol=0.01)
    assert [made[recent].manifest.provenance.recent for recent in (0, 8)] == [0, 8]
    assert made[0].bytes_per_token == made[8].bytes_per_token


class TestRefusals:
    def test_a_window_where_the_server_has_none(self, recipe, tmp_path):
        model = tiny_model("gemma3", tmp_path / "model")
        with pytest.raises(KVSpliceError, match=r"sliding-window layers.*leave recent out"):
            calibrate(str(model), tmp_path / "out", recipe.model_copy(update={"recent": 8}))

    def test_model_with_nothing_but_sliding_windows(self, recipe, tmp_path):
        model = tiny_model("mistral", tmp_path / "model", sliding_window=24)
        with pytest.raises(KVSpliceError, match="full-attention"):
            calibrate(str(model), tmp_path / "out", recipe)

    def test_head_size_that_is_no_multiple_of_a_group(self, recipe, tmp_path):
        model = tiny_model("llama", tmp_path / "model", head_dim=20)
        with pytest.raises(KVSpliceError, match="head size 20"):
            calibrate(str(model), tmp_path / "out", recipe)

    def test_attention_that_cannot_be_reached(self, recipe, tmp_path):
        config = BloomConfig(vocab_size=512, hidden_size=64, n_layer=1, n_head=2)
        BloomForCausalLM(config).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        with pytest.raises(KVSpliceError, match="attention interface"):
            calibrate(str(tmp_path / "model"), tmp_path / "out", recipe)

    def test_weights_that_are_not_numbers(self, llama, recipe, tmp_path):
        weights = load_file(llama / "model.safetensors")
        weights["model.layers.1.self_attn.v_proj.weight"][0] = torch.nan
        save_file(weights, llama / "model.safetensors", {"format": "pt"})
        with pytest.raises(KVSpliceError, match="not finite"):
            calibrate(str(llama), tmp_path / "out", recipe)

    def test_windows_longer_than_a_model_with_learned_positions_reads(self, recipe, tmp_path):
        model = tiny_model("gpt2", tmp_path / "model", max_position_embeddings=48)
        with pytest.raises(KVSpliceError, match="48"):
            calibrate(str(model), tmp_path / "out", recipe)

    def test_text_shorter_than_a_window(self, llama, recipe, tmp_path):
        (tmp_path / "short.txt").write_text("short")
        with pytest.raises(KVSpliceError, match="fewer than one window of 64"):
            calibrate(str(llama), tmp_path / "out", recipe.model_copy(update={"text": str(tmp_path / "short.txt")}))

    def test_output_directory_with_something_else_in_it(self, llama, recipe, tmp_path):
        with pytest.raises(KVSpliceError, match="is no artifact"):
            calibrate(str(llama), llama, recipe)
        assert (llama / "config.json").exists()

    def test_text_too_short_to_hold_a_window_out_is_found_before_anything_is_measured(
        self, llama, recipe, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(study, "collect", refuse_to_measure)
        (tmp_path / "short.txt").write_text(TEXT[:600])
        with pytest.raises(KVSpliceError, match="fewer than one window of 64"):
            calibrate(str(llama), tmp_path / "out", recipe.model_copy(update={"text": str(tmp_path / "short.txt")}))


class TestRecipes:
    @pytest.fixture
    def write(self, tmp_path):
        def write(content: str) -> Path:
            (tmp_path / "recipe.yaml").write_text(content)
            return tmp_path / "recipe.yaml"

        return write

    def test_settings_come_from_the_file(self, write):
        config = read_config(write("bits: 3\ntext: some.txt\ntokens: 2048\ncontext: 128\nseed: 7\n"))
        assert config == CalibrationConfig(bits=3.0, text="some.txt", tokens=2048, context=128, seed=7)

    @pytest.mark.parametrize("content", ["", "# nothing but a comment\n", "{}"])
    def test_empty_recipe_is_all_defaults(self, content, write):
        assert read_config(write(content)) == read_config(None)
        assert (read_config(None).bits, read_config(None).text) == (4.0, "pydoc")

    def test_default_is_four_bits_however_the_configuration_is_made(self):
        assert CalibrationConfig().bits == CalibrationConfig(text="some.txt").bits == 4.0
        assert CalibrationConfig(budget=500).bits is None

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"bits": 3.0}, {"bits": 3.0, "budget": None}),
            ({"budget": 900}, {"bits": None, "budget": 900}),
            ({"seed": 0, "text": None}, {"bits": 5.0, "seed": 0, "text": "some.txt"}),
        ],
        ids=str,
    )
    def test_command_line_comes_before_the_file(self, options, expected, write):
        config = read_config(write("bits: 5\ntext: some.txt\nseed: 7\n"), **options)
        assert {name: getattr(config, name) for name in expected} == expected

    def test_bits_on_the_command_line_replace_a_budget_in_the_file(self, write):
        config = read_config(write("budget: 900\n"), bits=2.0)
        assert (config.bits, config.budget, config.requested) == (2.0, None, "2 bits")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("bitz: 3\n", "setting bitz: "),
            ("bits: 3\nbudget: 900\n", "bits or budget, not both"),
            ("bits: 1\n", "setting bits: .*1.5"),
            ("bits: 9\n", "setting bits: .*8"),
            ("bits: .nan\n", "setting bits: "),
            ("budget: 0\n", "setting budget: "),
            ("tokens: many\n", "setting tokens: "),
            ("context: 4\n", "setting context: "),
            (f"seed: {2**70}\n", "setting seed: "),
            ("- bits\n", "not a mapping"),
            ("bits: [3\n", "cannot read the recipe"),
        ],
    )
    def test_mistakes_are_named(self, content, message, write):
        with pytest.raises(KVSpliceError, match=message):
            read_config(write(content))

    def test_both_sizes_on_the_command_line_are_refused(self):
        with pytest.raises(KVSpliceError, match="bits or budget, not both"):
            read_config(None, bits=3.0, budget=900)

    def test_missing_recipe_is_refused(self, tmp_path):
        with pytest.raises(KVSpliceError, match=r"cannot read the recipe .*nowhere\.yaml"):
            read_config(tmp_path / "nowhere.yaml")

    def test_every_recipe_that_is_shipped_is_valid(self):
        for file in (Path(study.__file__).parent.parent / "configs").glob("*.yaml"):
            read_config(file)

"""The command line as a user types it, on a tiny model."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner

from calibration.evaluate import Evaluation
from calibration.planners.search import CURVE_BITS
from tests.models import TEXT, tiny_model
from vllm_kvsplice.artifact import Artifact, load_artifact
from vllm_kvsplice.cli import app
from vllm_kvsplice.doctor import examine
from vllm_kvsplice.engines import ENGINES
from vllm_kvsplice.errors import KVSpliceError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its text, and its artifact at 2 bits."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    model = tiny_model("llama", folder / "model")
    run("calibrate", model, "--out", folder / "artifact", "--text", folder / "text.txt", "--bits", 2, *SMALL)
    return folder


SMALL = ("--tokens", 1024, "--context", 64)


def run(*arguments: object) -> str:
    """Output of `kvsplice` with these arguments; raises what it raises."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def judge(folder: Path, *options: object) -> dict[str, float]:
    text = ("--text", folder / "text.txt", "--context", 48, "--windows", 2)
    run("eval", folder / "model", folder / "artifact", *text, *options, "--json", folder / "figures.json")
    return json.loads((folder / "figures.json").read_text())


def test_figures_name_what_they_were_measured_on(folder: Path) -> None:
    figures = judge(folder, "--recent", 8, "--exact-prompt", 16)
    expected = {"mode": "all", "context": 48, "recent_window": 8, "exact_prompt": 16, "tokens": 2 * (48 - 16)}
    assert {name: figures[name] for name in expected} == expected

    assert abs(judge(folder)["change_percent"]) > 1e-3
    assert judge(folder)["divergence"] > 1e-5
    assert abs(judge(folder)["change_percent"]) > 1e-3
    assert judge(folder, "--recent", 48)["change_percent"] == pytest.approx(0, abs=1e-4)


def test_an_exact_prompt_must_leave_something_to_judge(folder: Path) -> None:
    with pytest.raises(KVSpliceError, match="--exact-prompt 48 leaves nothing to judge of windows of 48"):
        judge(folder, "--exact-prompt", 48)


def test_windows_longer_than_the_model_reads_are_refused(folder: Path) -> None:
    with pytest.raises(KVSpliceError, match="windows of 1024 tokens exceed the 512 the model reads; lower --context"):
        judge(folder, "--context", 1024)


def test_without_a_context_windows_are_as_long_as_the_model_reads(folder: Path) -> None:
    text = ("--text", folder / "text.txt", "--windows", 1, "--json", folder / "whole.json")
    run("eval", folder / "model", folder / "artifact", *text)
    assert json.loads((folder / "whole.json").read_text())["context"] == 512


@pytest.mark.parametrize(
    ("place", "message"),
    [("text.txt/x", "is no directory that can be written to"), (".", "is a directory; name a file")],
)
@pytest.mark.parametrize(
    "command", [("eval", "M", "A", "--json"), ("plan", "M", "--out"), ("calibrate", "M", "--out", "made", "--errors")]
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(folder: Path, command, place, message) -> None:
    # There is no model M.
    with pytest.raises(KVSpliceError, match=message):
        run(*command, folder / place, "--text", folder / "text.txt")


def test_the_directory_one_is_in_is_not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "artifact")
    with pytest.raises(KVSpliceError, match="is the directory you are in"):
        run("calibrate", folder / "model", "--out", ".", "--text", folder / "text.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [("no JSON", "cannot read the plan"), ('{"rnk": 16}', "rnk: Extra inputs"), ("[]", "holds no JSON object")],
)
def test_a_plan_that_is_none_is_refused_before_anything_is_measured(folder: Path, content: str, message: str) -> None:
    (folder / "bad.json").write_text(content)
    # There is no model M.
    with pytest.raises(KVSpliceError, match=message):
        run("calibrate", "M", "--out", folder / "never", "--plan", folder / "bad.json")


@pytest.mark.parametrize("change", [None, "little"])
def test_measured_plans_without_numbers_are_refused(folder: Path, change: object) -> None:
    run("plan", folder / "model", "--text", folder / "text.txt", "--out", folder / "a plan.json", *SMALL)
    row = {"planner": "budget", "bytes_per_token": 320, "predicted_percent": 1.0, "change_percent": change}
    (folder / "measured.json").write_text(json.dumps([row]))
    with pytest.raises(KVSpliceError, match=r"cannot read measured plans from .*make bench-planners"):
        run(
            "report",
            "--plan",
            folder / "a plan.json",
            "--measured",
            folder / "measured.json",
            "--out",
            folder / "p.html",
        )


class TestDoctor:
    def test_a_sound_installation_passes(self, folder: Path) -> None:
        checks = list(examine(str(folder / "model"), str(folder / "artifact")))
        assert [check.detail for check in checks if not check.passed] == []
        assert [check.name for check in checks][-2:] == ["compiler", "artifact"]

    def test_a_broken_one_is_told_about_line_by_line(self, folder: Path, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
        monkeypatch.delitem(ENGINES, "cpu")
        failed = {check.name: check.detail for check in examine(None, None) if not check.passed}
        assert failed["attention backend"].startswith("ModuleNotFoundError")
        assert "pip install --no-build-isolation ." in failed["engine"]


class TestServe:
    """What is handed on to vLLM, which is not started."""

    @pytest.mark.parametrize(
        ("options", "section"),
        [
            ((), {}),
            (("--additional-config", '{"kvsplice": {"recent_window": 0}}'), {"recent_window": 0}),
            (("--additional-config.kvsplice.recent_window", "64"), {"recent_window": 64}),
            (("--additional_config.kvsplice.engine=reference",), {"engine": "reference"}),
        ],
    )
    def test_settings_reach_vllm_beside_the_artifact(self, folder: Path, options, section, monkeypatch) -> None:
        monkeypatch.setattr("vllm.entrypoints.cli.main.main", lambda: None)
        monkeypatch.setattr("sys.argv", ["kvsplice"])
        run("serve", folder / "model", folder / "artifact", *options, "--port", 1)
        given = sys.argv[sys.argv.index("--additional-config") + 1]
        assert json.loads(given)["kvsplice"] == section | {"artifact": str(folder / "artifact")}
        assert sys.argv[-2:] == ["--port", "1"]

    def test_the_artifact_may_stand_in_the_settings(self, folder: Path, monkeypatch) -> None:
        monkeypatch.setattr("vllm.entrypoints.cli.main.main", lambda: None)
        monkeypatch.setattr("sys.argv", ["kvsplice"])
        option = ("--additional-config.kvsplice.artifact", folder / "artifact")
        run("serve", folder / "model", *option)
        given = sys.argv[sys.argv.index("--additional-config") + 1]
        assert json.loads(given)["kvsplice"] == {"artifact": str(folder / "artifact")}
        with pytest.raises(KVSpliceError, match="give one of them"):
            run("serve", folder / "model", folder / "another", *option)

    @pytest.mark.parametrize("given", ["[]", "{", '{"kvsplice": null}'])
    def test_settings_that_are_no_object_are_refused(self, folder: Path, given: str) -> None:
        with pytest.raises(KVSpliceError, match=r"--additional-config .* is not a JSON object"):
            run("serve", folder / "model", folder / "artifact", "--additional-config", given)

    def test_options_before_the_model_are_refused(self, folder: Path) -> None:
        with pytest.raises(KVSpliceError, match="give MODEL before options such as --port"):
            run("serve", "--port", 1, folder / "model", folder / "artifact")


class TestPlanning:
    @pytest.fixture(scope="class")
    def planned(self, folder: Path) -> Path:
        """A plan of `budget` at 3 bits."""
        text = ("--text", folder / "text.txt", *SMALL)
        run("plan", folder / "model", *text, "--bits", 3, "--out", folder / "plan.json")
        return folder / "plan.json"

    def calibrate(self, folder: Path, name: str, *options: object) -> Path:
        text = ("--text", folder / "text.txt", *SMALL)
        run("calibrate", folder / "model", "--out", folder / name, *text, *options)
        return folder / name

    def test_calibration_takes_a_plan_as_it_stands(self, folder: Path, planned: Path) -> None:
        content = json.loads(planned.read_text())
        content["layers"][1]["heads"][0]["key"] = [8, 0, 0, 8]
        edited = folder / "edited.json"
        edited.write_text(json.dumps(content))
        artifact = load_artifact(self.calibrate(folder, "edited", "--plan", edited))
        layers = [[(h["key"], h["value"]) for h in layer["heads"]] for layer in content["layers"]]
        made = [[(list(k), list(v)) for k, v in zip(p.key, p.value, strict=True)] for p in artifact.manifest.layers]
        assert made == layers
        assert artifact.manifest.provenance.planner == "budget"

    def test_a_plan_tells_what_to_expect(self, folder: Path, planned: Path) -> None:
        content = json.loads(planned.read_text())
        artifact = load_artifact(self.calibrate(folder, "three", "--bits", 3))
        assert content["bytes_per_token"] == artifact.bytes_per_token
        expected = artifact.manifest.provenance.expected_change_percent
        assert content["expected_percent"] == pytest.approx(expected, rel=1e-3)
        growth = [point["expected_percent"] for point in content["curve"]]
        assert growth == sorted(growth, reverse=True)
        assert "expected" in run("inspect", folder / "three")

    def test_a_small_model_has_a_plan_though_not_of_every_size(self, folder: Path) -> None:
        model = tiny_model("llama", folder / "small", num_key_value_heads=1)
        given = ("--text", folder / "text.txt", *SMALL, "--bits", 4, "--out", folder / "small.json")
        assert "96 of 384 bytes per token" in run("plan", model, *given)
        assert len(json.loads((folder / "small.json").read_text())["curve"]) < len(CURVE_BITS)

    def test_a_plan_stands_in_for_the_size_of_a_recipe(self, folder: Path, planned: Path) -> None:
        (folder / "recipe.yaml").write_text("bits: 5\n")
        made = self.calibrate(folder, "replaced", "--config", folder / "recipe.yaml", "--plan", planned)
        assert load_artifact(made).bits_per_element == pytest.approx(3)

    def test_a_plan_is_printed_head_by_head(self, folder: Path) -> None:
        words = run("plan", folder / "model", "--text", folder / "text.txt", *SMALL, "--planner", "tiers", "--bits", 4)
        assert sum("rank" in line for line in words.splitlines()) == 6
        assert "bytes per token, 4.000 bits per" in words

    def test_tiers_take_metrics_from_a_file(self, folder: Path) -> None:
        rows = [("run_name", "layer", "head", "metric", "value")]
        for layer in range(3):
            for head in range(4):
                values = {"trace": 0.99 if (layer, head) == (1, 3) else 0.5, "cond": 2e7, "eigmax": 0.1}
                rows += [("mine", f"layer{layer}", f"head{head}", *item) for item in values.items()]
        with (folder / "fim_summary_mine.csv").open("w", newline="") as opened:
            csv.writer(opened).writerows(rows)
        options = ("--planner", "tiers", "--fim", folder / "fim_summary_mine.csv")
        artifact = load_artifact(self.calibrate(folder, "tiers", *options))
        widths = [[list(k) for k in plan.key] for plan in artifact.manifest.layers]
        compressed, critical = [4, 0, 0, 0], [8, 8, 8, 8]
        assert widths == [[compressed] * 2, [compressed, critical], [compressed] * 2]

    def test_a_limit_on_perplexity_finds_its_size(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        judged: list[Tensor] = []

        def judge(model: str, artifact: Artifact, windows: Tensor, *_: object) -> Evaluation:
            # A tiny random model's own perplexity does not fall with more bits.
            judged.append(windows)
            growth = 2**-artifact.bits_per_element
            return Evaluation(10.0, 10 + 10 * growth, math.log1p(growth), 100)

        monkeypatch.setattr("calibration.pipeline.judge", judge)
        artifact = load_artifact(self.calibrate(folder, "limited", "--max-ppl-increase", "5%"))
        assert 4 < artifact.bits_per_element < 4.7
        quality, provenance = artifact.manifest.quality, artifact.manifest.provenance
        assert quality is not None
        assert quality.change_percent <= 5
        assert provenance.requested == "perplexity +5 % at most"
        # What it was searched on is not what it is judged on.
        assert not (judged[0][:, None] == judged[-1]).all(-1).any()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--bits", 3, "--max-ppl-increase", "1%"), "give bits or max_ppl_increase, not both"),
            (("--planner", "manual"), "planner manual and a plan file go together"),
            (("--planner", "tiers", "--plan", "plan.json"), "planner manual and a plan file go together"),
            (("--plan", "plan.json", "--bits", 3), "has its own size; leave bits out"),
            (("--fim", "fim.json"), "^only planner tiers reads FIM metrics"),
            (("--plan", "missing.json"), r"cannot read the plan missing.json \(.*No such file"),
            (("--budget", 40), "outside 48..384 for 3 layers; choose --bits between 1.5 and 8"),
            (("--max-ppl-increase", "one"), "max_ppl_increase: Input should be a valid number"),
            (("--max-ppl-increase", "-1%"), "max_ppl_increase: Input should be greater than 0"),
        ],
    )
    def test_options_that_contradict_each_other_are_refused(self, folder: Path, options, message) -> None:
        with pytest.raises(KVSpliceError, match=message):
            run("plan", folder / "model", *options)


class TestAnalysis:
    @pytest.fixture(scope="class")
    def analysis(self, folder: Path) -> Path:
        text = ("--text", folder / "text.txt", *SMALL)
        run("fim", folder / "model", *text, "--out", folder / "analysis", "--name", "mine")
        return folder / "analysis"

    def test_metrics_are_written_in_three_forms(self, analysis: Path) -> None:
        assert {path.name for path in analysis.iterdir()} == {
            "fim.txt",
            "fim_metrics_mine.json",
            "fim_summary_mine.csv",
        }
        assert "Run mine" in (analysis / "fim.txt").read_text()

    def test_runs_are_read_from_files_and_compared(self, analysis: Path, folder: Path) -> None:
        (folder / "other.csv").write_text("run_name,layer,head,metric,value\nother,layer0,head0,trace,0.9\n")
        files = ("--import", analysis / "fim_metrics_mine.json", "--import", folder / "other.csv")
        words = run("fim", *files, "--out", folder / "compared", "--name", "both")
        assert "Runs compared" in words
        assert len(json.loads((folder / "compared" / "fim_metrics_both.json").read_text())) == 2

    def test_nothing_to_analyse_is_refused(self, folder: Path) -> None:
        with pytest.raises(KVSpliceError, match="give a MODEL, --import FILE or --wandb ENTITY/PROJECT"):
            run("fim", "--out", folder / "nothing")
        assert not (folder / "nothing").exists()

    def test_a_report_holds_what_it_was_given(self, analysis: Path, folder: Path) -> None:
        run("plan", folder / "model", "--text", folder / "text.txt", *SMALL, "--bits", 2, "--out", folder / "two.json")
        metrics = analysis / "fim_metrics_mine.json"
        given = ("--fim", metrics, "--plan", folder / "two.json", "--artifact", folder / "artifact")
        run("report", *given, "--out", folder / "report.html")
        page = (folder / "report.html").read_text()
        measured = load_artifact(folder / "artifact").manifest.quality
        assert measured is not None
        assert f"{measured.change_percent:+.2f} %" in page
        assert "Condition against trace" in page

    def test_a_report_of_nothing_is_refused(self, folder: Path) -> None:
        with pytest.raises(KVSpliceError, match="give --fim FILE, --plan FILE or both"):
            run("report", "--out", folder / "report.html")

"""The command line as a user types it, on a tiny model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.models import TEXT, tiny_model
from vllm_kvsplice.cli import app
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


def test_a_recent_window_as_long_as_the_context_leaves_nothing_compressed(folder: Path) -> None:
    assert abs(judge(folder)["change_percent"]) > 1e-3
    assert judge(folder, "--recent", 48)["change_percent"] == pytest.approx(0, abs=1e-4)


def test_an_exact_prompt_must_leave_something_to_judge(folder: Path) -> None:
    with pytest.raises(KVSpliceError, match="--exact-prompt 48 leaves nothing to judge of windows of 48"):
        judge(folder, "--exact-prompt", 48)

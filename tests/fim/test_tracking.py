"""Weights & Biases without its servers: the real client reads recorded responses, and writes runs to disk."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb

from calibration.fim.figures import condition_scatter
from calibration.fim.runs import make_run
from calibration.fim.tracking import export_run, import_runs
from tests.test_cli import run as kvsplice
from vllm_kvsplice.errors import KVSpliceError

# Answers to the client's GraphQL queries, by the name of the query, in the shape that api.wandb.ai gives them.
RESPONSES = json.loads((Path(__file__).parent / "wandb_responses.json").read_text())


class Recorded(BaseHTTPRequestHandler):
    """Answers a query by its name; an unknown one as W&B answers what does not exist."""

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["query"].split("query ")[1].split("(")[0].split()[0]
        key = f"{name} {query['variables']['project']}" if "project" in query.get("variables", {}) else name
        body = json.dumps(RESPONSES.get(key, {"data": {"project": None}})).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Not into the tests' output."""


@pytest.fixture
def settings(monkeypatch, tmp_path) -> Iterator[pytest.MonkeyPatch]:
    """W&B with a folder, a login and settings of its own."""
    for name, value in {
        "DIR": str(tmp_path),
        "API_KEY": "0" * 40,
        "SILENT": "true",
        "ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


@pytest.fixture
def server(settings) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Recorded) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        settings.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{served.server_port}")
        yield
        served.shutdown()


def test_runs_of_a_project_are_imported(server):
    baseline, changed = import_runs("team/gpt2")
    assert (baseline.name, changed.name) == ("baseline", "RA-one-gate")
    assert baseline.heads()[6, 8] == {"cond": 2.7e7, "eigmax": 0.27, "trace": 0.85}
    assert baseline.overall("trace") == 0.9165
    assert changed.heads() == {(11, 5): {"trace": 0.975}}
    assert "train/loss" not in baseline.metrics
    origin = baseline.run_info.model_dump()
    assert (origin["entity"], origin["project"], origin["id"], origin["state"]) == (
        "team",
        "gpt2",
        "a1b2c3",
        "finished",
    )


def test_a_project_without_such_metrics_is_refused(server):
    with pytest.raises(KVSpliceError, match="no run of the W&B project team/plain has a metric whose name begins"):
        import_runs("team/plain")


def test_a_project_that_does_not_exist_is_refused(server):
    with pytest.raises(KVSpliceError, match=r"cannot read the W&B project team/nothing .*give ENTITY/PROJECT"):
        import_runs("team/nothing")


def test_scores_heatmap_scatter_and_page_go_into_a_run(settings, tmp_path):
    settings.setenv("WANDB_MODE", "offline")
    metrics = {"trace": 0.97, "cond": 1e5, "energy_r8": 0.5, "eigmax": 0.1, "effective_rank": 7.0}
    run = make_run("mine", {f"fisher/layer2/head1/{name}": value for name, value in metrics.items()}, {})
    export_run("team/gpt2/abc", run, "in words", "<html>the page</html>", condition_scatter(run))
    # A run that is finished may not be written yet; the client's own process has written all when it ends.
    wandb.teardown()
    (written,) = tmp_path.glob("wandb/offline-run-*-abc")
    record = (written / "run-abc.wandb").read_bytes()
    names = ("compression_potential", "efficiency_score", "effective_rank", "trace_global_mean", "cond_global_mean")
    assert all(f"fim/{name}".encode() in record for name in names)
    (heatmap,) = written.glob("files/media/table/fim/compression_heatmap*.json")
    assert json.loads(heatmap.read_text()) == {
        "columns": ["layer", "head", "compression_score", "category"],
        "data": [["layer2", "head1", 25.0, "critical"]],
    }
    (scatter,) = written.glob("files/media/plotly/fim/scatter_cond_vs_trace*.json")
    assert json.loads(scatter.read_text())["data"][0]["y"] == [0.97]
    pages = sorted(path.read_text() for path in written.glob("files/media/html/fim/*.html"))
    assert any("in words" in content for content in pages)
    assert any("the page" in content for content in pages)


def test_a_project_becomes_files_and_a_run_by_one_command_each(server, settings, tmp_path):
    kvsplice("fim", "--wandb", "team/gpt2", "--out", tmp_path / "analysis")
    assert (tmp_path / "analysis" / "fim_metrics_team-gpt2.json").exists()
    assert "Run RA-one-gate" in (tmp_path / "analysis" / "fim.txt").read_text()
    wandb.teardown()
    settings.setenv("WANDB_MODE", "offline")
    metrics = tmp_path / "analysis" / "fim_summary_team-gpt2.csv"
    kvsplice("report", "--fim", metrics, "--out", tmp_path / "report.html", "--wandb-run", "team/gpt2/xyz")
    (logged,) = tmp_path.glob("wandb/offline-run-*-xyz/files/media/html/fim/report*.html")
    assert logged.read_text().count("Condition against trace") == 1


@pytest.mark.parametrize("target", ["abc", "gpt2/abc", "a/b/c/d"])
def test_a_target_of_another_form_is_refused(target):
    with pytest.raises(KVSpliceError, match="is not of the form ENTITY/PROJECT/RUN"):
        export_run(target, make_run("mine", {}, {}), "", "", None)

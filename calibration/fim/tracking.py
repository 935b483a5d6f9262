"""Weights & Biases: FIM metrics out of runs and into them. Needs the package `wandb`."""

from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from calibration.fim.runs import PREFIX, Run, RunInfo
from calibration.fim.scores import category, potential_of, run_scores
from vllm_kvsplice.errors import KVSpliceError

if TYPE_CHECKING:
    import wandb


def import_runs(project: str) -> list[Run]:
    """Every run of ``ENTITY/PROJECT`` that has Fisher metrics in its summary.

    Raises:
        KVSpliceError: `wandb` is missing, the project cannot be read, or no run has such metrics.

    """
    wandb = _wandb()
    try:
        found = [_record(run) for run in wandb.Api().runs(project, lazy=False)]
    # Network, login, permissions, a name that does not exist: for the user all mean one thing.
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise KVSpliceError(
            f"cannot read the W&B project {project} ({error}); give ENTITY/PROJECT, and log in with: wandb login"
        ) from error
    runs = [run for run in found if run.metrics]
    if not runs:
        raise KVSpliceError(f"no run of the W&B project {project} has a metric whose name begins with {PREFIX!r}")
    return runs


def _record(run: Any) -> Run:
    info = {name: getattr(run, name) for name in ("entity", "project", "id", "url", "state", "created_at")}
    # Summaries hold histograms and media as well.
    plain = {name: value for name, value in run.summary.items() if isinstance(value, (int, float, str))}
    return Run(run_info=RunInfo(display_name=run.name, **info), summary_metrics=plain)


def export_run(target: str, run: Run, text: str, page: str, scatter: Any) -> None:
    """Put scores, heatmap, scatter plot, reading and report into the W&B run ``ENTITY/PROJECT/RUN``, made if it is new.

    Args:
        target: where.
        run: the metrics.
        text: `calibration.fim.reading.reading`.
        page: the report, HTML.
        scatter: a plotly figure.

    Raises:
        KVSpliceError: `wandb` is missing, or `target` is not of that form or not writable.

    """
    wandb = _wandb()
    try:
        entity, project, identifier = target.split("/")
    except ValueError as error:
        raise KVSpliceError(f"--wandb-run {target} is not of the form ENTITY/PROJECT/RUN") from error
    try:
        with wandb.init(entity=entity, project=project, id=identifier, resume="allow") as opened:
            opened.summary.update(run_scores(run) | run.metrics)
            opened.log(
                {
                    "fim/compression_heatmap": _heatmap(wandb, run),
                    "fim/scatter_cond_vs_trace": scatter,
                    "fim/interpretation": wandb.Html(f"<pre>{escape(text)}</pre>"),
                    "fim/report": wandb.Html(page),
                }
            )
    except (wandb.errors.Error, OSError) as error:
        raise KVSpliceError(f"cannot write to the W&B run {target} ({error}); log in with: wandb login") from error


def _heatmap(wandb: Any, run: Run) -> "wandb.Table":
    rows = [
        [f"layer{layer}", f"head{head}", potential_of(values), category(values)]
        for (layer, head), values in sorted(run.heads().items())
    ]
    return wandb.Table(columns=["layer", "head", "compression_score", "category"], data=rows)


def _wandb() -> Any:
    if find_spec("wandb") is None:
        raise KVSpliceError("W&B is not installed here; get it with: pip install wandb")
    import wandb

    return wandb

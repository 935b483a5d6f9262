"""`kvsplice fim` and `kvsplice report`: Fisher information as people read it."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vllm_kvsplice.commands import options
from vllm_kvsplice.commands.printing import console
from vllm_kvsplice.errors import KVSpliceError

if TYPE_CHECKING:
    from calibration.fim.report import Row
    from calibration.fim.runs import Run

WandbRun = Annotated[Optional[str], typer.Option(help="Log all of it to this W&B run, ENTITY/PROJECT/RUN.")]


def fim(
    out: Annotated[
        Path,
        typer.Option(
            help="Directory for fim_metrics_NAME.json, fim_summary_NAME.csv and fim.txt.",
            callback=options.output,
        ),
    ],
    model: Annotated[Optional[str], typer.Argument(help="Model directory or Hub name.", metavar="[MODEL]")] = None,
    name: Annotated[Optional[str], typer.Option(help="Of the files, and of the run.  [default: the model's]")] = None,
    imports: Annotated[
        Optional[list[Path]],
        typer.Option("--import", help="Metrics files of other runs, JSON or CSV; may be given several times."),
    ] = None,
    wandb: Annotated[Optional[str], typer.Option(help="Import all runs of this W&B project, ENTITY/PROJECT.")] = None,
    wandb_run: WandbRun = None,
    text: options.Text = None,
    tokens: options.Tokens = None,
    context: options.Context = None,
    seed: options.Seed = None,
    statistics: options.Statistics = None,
) -> None:
    """Measure Fisher information of every layer and head, or read it from other runs, and put it into files and words.

    Examples:

    `kvsplice fim ./my-model --text my-domain.txt --out analysis --statistics measured.safetensors`

    `kvsplice fim --wandb my-team/gpt2-ablations --out analysis --name ablations`
    """
    from calibration.fim.reading import reading
    from calibration.fim.runs import read_runs, write_runs

    runs: list[Run] = []
    if model:
        runs.append(_measured(model, name, statistics, text=text, tokens=tokens, context=context, seed=seed))
    for file in imports or ():
        runs += read_runs(file)
    if wandb:
        from calibration.fim.tracking import import_runs

        runs += import_runs(wandb)
    if not runs:
        raise KVSpliceError("there is nothing to analyse; give a MODEL, --import FILE or --wandb ENTITY/PROJECT")
    words = reading(runs)
    written = write_runs(runs, out, (name or wandb or runs[0].name).replace("/", "-"))
    (out / "fim.txt").write_text(words)
    console.print(words.split("\nHeads of ")[0])
    for file in (*written, out / "fim.txt"):
        console.print(f"Wrote {file}")
    if wandb_run:
        _log(wandb_run, runs[0])


def _measured(model: str, name: str | None, statistics: Path | None, **settings: int | str | None) -> "Run":
    from calibration.fim.measure import fim_run
    from calibration.models import short_name
    from calibration.recipe import read_config
    from calibration.study import study

    return fim_run(study(model, read_config(None, **settings), statistics), name or short_name(model))


def report(
    out: Annotated[
        Path, typer.Option(help="The page, one HTML file that needs nothing else.", callback=options.output_file)
    ],
    fim: Annotated[Optional[Path], typer.Option(help="FIM metrics that kvsplice fim wrote.")] = None,
    plan: Annotated[Optional[Path], typer.Option(help="A plan that kvsplice plan wrote.")] = None,
    artifact: Annotated[
        Optional[Path], typer.Option(help="The artifact made from it, for its measured quality.")
    ] = None,
    measured: Annotated[
        Optional[Path], typer.Option(help="Plans expected and measured, as make bench-planners writes them.")
    ] = None,
    wandb_run: WandbRun = None,
) -> None:
    """Draw metrics, plan and measurements on one page that opens in any browser, offline.

    Example: `kvsplice report --fim analysis/fim_metrics_my-model.json --plan plan.json --out report.html`
    """
    from calibration.fim.report import Findings, page
    from calibration.fim.runs import read_runs
    from calibration.planners.files import load_plan_file
    from vllm_kvsplice.artifact import load_artifact

    if not fim and not plan:
        raise KVSpliceError("there is nothing to draw; give --fim FILE, --plan FILE or both")
    quality = load_artifact(artifact).manifest.quality if artifact else None
    findings = Findings(
        run=read_runs(fim)[0] if fim else None,
        plan=load_plan_file(plan) if plan else None,
        measured_percent=quality.change_percent if quality else None,
        comparisons=_rows(measured) if measured else (),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    content = page(findings)
    out.write_text(content, encoding="utf-8")
    console.print(f"Wrote {out}; open it in a browser")
    if wandb_run:
        if not findings.run:
            raise KVSpliceError("--wandb-run needs metrics to log; give --fim FILE")
        _log(wandb_run, findings.run, content)


def _rows(file: Path) -> "list[Row]":
    try:
        rows = json.loads(file.read_text())
        names = ("planner", "bytes_per_token", "predicted_percent", "change_percent")
        found = [{name: row[name] for name in names} for row in rows]
        for row in found:
            # `math` refuses what is no number.
            math.fsum(row[name] for name in names[1:])
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KVSpliceError(
            f"cannot read measured plans from {file} ({error}); make bench-planners writes them"
        ) from error


def _log(target: str, run: "Run", content: str | None = None) -> None:
    from calibration.fim.figures import condition_scatter
    from calibration.fim.reading import reading
    from calibration.fim.report import Findings, page
    from calibration.fim.tracking import export_run

    export_run(target, run, reading([run]), content or page(Findings(run=run)), condition_scatter(run))
    console.print(f"Logged to W&B: {target}")

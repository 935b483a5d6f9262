"""FIM metrics of runs in the formats of the field's tools: JSON records, a tall CSV table, Weights & Biases.

A run's metrics have names as in W&B: ``fisher/trace_global_mean``, ``fisher/layer3/head5/trace``. In the tall table the
same are rows (run_name, layer, head, metric, value) with layer ``global`` or ``layer3`` and head ``all``, ``head5`` or, for
keys and values, ``kvhead1``.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvsplice.errors import KVSpliceError

PREFIX = "fisher/"
COLUMNS = ("run_name", "layer", "head", "metric", "value")
_HEAD = re.compile(r"fisher/layer(\d+)/(head|kvhead)(\d+)/(.+)")

# Metrics of one head by name, by (layer, head).
Heads = dict[tuple[int, int], dict[str, float]]


class RunInfo(BaseModel):
    """Where metrics come from."""

    model_config = ConfigDict(extra="allow", frozen=True)

    display_name: str = "unknown"


class Run(BaseModel):
    """Metrics of one run; in `fim_metrics_<name>.json` stands a list of these.

    Attributes:
        run_info: its name and origin.
        summary_metrics: by name; other tools' records hold entries that are no numbers, which are skipped.
        spectra: eigenvalues, largest first, by name (``fisher/layer3/head5/spectrum``).

    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    run_info: RunInfo = RunInfo()
    summary_metrics: dict[str, Any]
    spectra: dict[str, list[float]] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.run_info.display_name

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers among `summary_metrics` that are Fisher metrics and finite."""
        numbers = {n: float(v) for n, v in self.summary_metrics.items() if isinstance(v, (int, float))}
        return {n: v for n, v in numbers.items() if n.startswith(PREFIX) and math.isfinite(v)}

    def heads(self, kind: str = "head") -> Heads:
        """Metrics of every query head, or with `kind` "kvhead" of every KV head."""
        found: Heads = defaultdict(dict)
        for name, value in self.metrics.items():
            match = _HEAD.fullmatch(name)
            if match and match[2] == kind:
                found[int(match[1]), int(match[3])][match[4]] = value
        return dict(found)

    def overall(self, metric: str) -> float:
        """``<metric>_global_mean``, or the mean over heads where a run has none; NaN without either."""
        known = self.metrics.get(f"{PREFIX}{metric}_global_mean")
        values = [head[metric] for head in self.heads().values() if metric in head]
        return known if known is not None else sum(values) / len(values) if values else math.nan


def named(heads: Mapping[tuple[int, int], Mapping[str, float]]) -> dict[str, float]:
    """Metrics of query heads under their names in a run."""
    return {
        f"{PREFIX}layer{layer}/head{head}/{metric}": value
        for (layer, head), values in heads.items()
        for metric, value in values.items()
    }


def make_run(name: str, metrics: Mapping[str, float], spectra: Mapping[str, list[float]], **info: Any) -> Run:
    """A run of our own; for every metric of query heads its mean and maximum over all of them is added."""
    run = Run(run_info=RunInfo(display_name=name, **info), summary_metrics=dict(metrics), spectra=dict(spectra))
    by_metric = defaultdict(list)
    for head in run.heads().values():
        for metric, value in head.items():
            by_metric[metric].append(value)
    overall = {f"{PREFIX}{metric}_global_mean": sum(v) / len(v) for metric, v in by_metric.items()}
    overall |= {f"{PREFIX}{metric}_global_max": max(v) for metric, v in by_metric.items()}
    return run.model_copy(update={"summary_metrics": overall | run.summary_metrics})


def table(runs: Iterable[Run]) -> pandas.DataFrame:
    """The tall table of `runs`, with columns `COLUMNS`."""
    rows = [(run.name, *_place(name), value) for run in runs for name, value in run.metrics.items()]
    return pandas.DataFrame(rows, columns=list(COLUMNS))


def _place(name: str) -> tuple[str, str, str]:
    """Layer, head and metric of ``fisher/layer3/head5/trace``, ``fisher/layer3/trace`` or ``fisher/trace``."""
    parts = name.split("/")[1:]
    if len(parts) == 1:
        return "global", "all", parts[0]
    if len(parts) == 2:
        return parts[0], "all", parts[1]
    return parts[0], parts[1], "/".join(parts[2:])


def from_table(rows: pandas.DataFrame) -> list[Run]:
    """The runs of a tall table, in the order in which they appear."""
    runs: dict[str, dict[str, float]] = {}
    rows = rows.assign(value=pandas.to_numeric(rows["value"], errors="coerce"))
    for run_name, layer, head, metric, value in rows[list(COLUMNS)].itertuples(index=False):
        place = "" if layer == "global" else f"{layer}/" if head == "all" else f"{layer}/{head}/"
        runs.setdefault(str(run_name), {})[f"{PREFIX}{place}{metric}"] = value
    return [Run(run_info=RunInfo(display_name=name), summary_metrics=metrics) for name, metrics in runs.items()]


def read_runs(file: Path) -> list[Run]:
    """Runs from `fim_metrics_<name>.json` or `fim_summary_<name>.csv`, ours or other tools'.

    Raises:
        KVSpliceError: the file is missing, is neither, or holds no Fisher metrics.

    """
    try:
        if file.suffix == ".csv":
            # "nan" may well be the name of a run.
            runs = from_table(pandas.read_csv(file, dtype={"run_name": str}, keep_default_na=False))
        else:
            content = json.loads(file.read_text())
            runs = [Run.model_validate(run) for run in (content if isinstance(content, list) else [content])]
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise KVSpliceError(
            f"cannot read FIM metrics from {file} ({str(error).splitlines()[0]}); "
            "give fim_metrics_<name>.json or fim_summary_<name>.csv, as kvsplice fim writes them"
        ) from error
    if not any(run.metrics for run in runs):
        raise KVSpliceError(f"{file} holds no metric whose name begins with {PREFIX!r}")
    return runs


def write_runs(runs: list[Run], directory: Path, name: str) -> list[Path]:
    """`fim_metrics_<name>.json` and `fim_summary_<name>.csv` in `directory`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    records, rows = directory / f"fim_metrics_{name}.json", directory / f"fim_summary_{name}.csv"
    records.write_text(json.dumps([run.model_dump() for run in runs], indent=1) + "\n")
    table(runs).to_csv(rows, index=False)
    return [records, rows]

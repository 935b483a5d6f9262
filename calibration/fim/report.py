"""One HTML page of all that is known of a model and a plan: self-contained, offline, light and dark, narrow and wide."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from calibration.fim import figures
from calibration.fim.reading import reading
from calibration.fim.runs import Run
from calibration.fim.scores import category, run_scores
from calibration.planners.files import PlanFile

Row = dict[str, float | str]


@dataclass(frozen=True)
class Findings:
    """What a report is made of; panels whose data is missing are left out.

    Attributes:
        run: FIM metrics.
        plan: where the bits go.
        measured_percent: growth of perplexity measured under the plan.
        comparisons: rows of ``make bench-planners``.

    """

    run: Run | None = None
    plan: PlanFile | None = None
    measured_percent: float | None = None
    comparisons: Sequence[Row] = field(default=())


def page(findings: Findings) -> str:
    """The page as HTML."""
    panels = list(_panels(findings))
    cards = "".join(
        f'<section><h2>{escape(title)}</h2><p>{escape(words)}</p><div class="plot" id="panel{i}"></div></section>'
        for i, (title, words, _) in enumerate(panels)
    )
    drawn = {f"panel{i}": json.loads(figure.to_json()) for i, (_, _, figure) in enumerate(panels)}
    for figure in drawn.values():
        figure["layout"].pop("template", None)
    run, plan = findings.run, findings.plan
    name = (plan and plan.model) or (run and run.name) or "model"
    template = Template((files("calibration.fim") / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"Fisher information and plan: {name}" if plan else f"Fisher information: {name}"),
        subtitle=escape(_subtitle(findings)),
        facts="".join(f"<div><b>{escape(value)}</b><p>{escape(what)}</p></div>" for what, value in _facts(findings)),
        cards=cards,
        details=_details(findings),
        plotly=get_plotlyjs(),
        # Inside a script, "</" would end it.
        figures=json.dumps(drawn).replace("</", "<\\/"),
    )


def _panels(findings: Findings) -> Iterator[tuple[str, str, go.Figure]]:
    """Title, explanation and figure of every panel."""
    run, plan = findings.run, findings.plan
    if run and run.heads():
        yield (
            "Compression potential by layer and head",
            "How uneven and concentrated attention's Fisher matrix is. Crosses: critical heads (trace above 0.95). "
            "Dots: high potential (above 70).",
            figures.compression_heatmap(run),
        )
        yield (
            "Condition against trace",
            "A point a head; colour is depth, size the effective rank. Lines: the published rule's cond 1e6, trace 0.90.",
            figures.condition_scatter(run),
        )
    if run and run.spectra:
        for kind, words in (("key", "keys"), ("value", "values"), ("attention", "attention")):
            about = "what an error costs by direction" if kind != "attention" else "in token space"
            yield (f"Fisher spectrum of {words}", f"Eigenvalues, a line a layer: {about}.", figures.spectra(run, kind))
    if run and any(name.endswith("_activation_compression") for name in run.metrics):
        yield (
            "Weights and activations",
            "Directions in use: activations keep to few, the weights that make them do not.",
            figures.directions_of_maps(run),
        )
    if plan:
        yield "Where the bits go", "Width of each group of 8 latents. Hover for reasons.", figures.bits_map(plan)
        if plan.curve:
            yield "Rate and distortion", "What other sizes are expected to cost.", figures.rate_distortion(plan)
        yield "Memory of a sequence", "Dense cache and this plan.", figures.memory(plan)
    rows = list(_compared(findings))
    if rows:
        yield (
            "Expected and measured",
            "Growth of perplexity, a point a plan; none for plans that measured no growth.",
            figures.expected_and_measured(rows),
        )


def _compared(findings: Findings) -> Iterator[Row]:
    yield from findings.comparisons
    plan = findings.plan
    if plan and findings.measured_percent is not None:
        yield {
            "planner": "this plan",
            "bytes_per_token": plan.bytes_per_token,
            "predicted_percent": plan.expected_percent,
            "change_percent": findings.measured_percent,
        }


def _subtitle(findings: Findings) -> str:
    parts = []
    if findings.run:
        origin = findings.run.run_info.model_dump()
        parts.append(f"FIM metrics: {findings.run.name}" + (f", on {origin['text']}" if origin.get("text") else ""))
    if findings.plan:
        parts.append(f"planner: {findings.plan.planner}")
    return "; ".join(parts)


def _facts(findings: Findings) -> Iterator[tuple[str, str]]:
    """What the number is, and the number."""
    plan, run = findings.plan, findings.run
    if plan:
        yield "smaller than 16 bits", f"{plan.baseline_bytes_per_token / plan.bytes_per_token:.2f}x"
        yield "bits per element", f"{plan.bits_per_element:.2f}"
        yield "perplexity, expected", f"{plan.expected_percent:+.2f} %"
    if findings.measured_percent is not None:
        yield "perplexity, measured", f"{findings.measured_percent:+.2f} %"
    if run and run.heads():
        counts = Counter(category(values) for values in run.heads().values())
        yield "critical heads", f"{counts['critical']} of {len(run.heads())}"
        scores = run_scores(run)
        yield "compression potential", f"{scores['fim/compression_potential']:.0f} / 100"
        yield "effective rank, mean", f"{scores['fim/effective_rank']:.1f}"


def _details(findings: Findings) -> str:
    """Every decision with its reason, and the metrics in words, folded away."""
    folded = ""
    if findings.plan:
        rows = "".join(
            f"<tr><td>{layer.layer}/{head.head}</td><td>{sum(head.key)} + {sum(head.value)}</td>"
            f"<td>{escape(head.reason)}</td></tr>"
            for layer in findings.plan.layers
            for head in layer.heads
        )
        header = "<tr><th>layer/head</th><th>bytes, keys + values</th><th>reason</th></tr>"
        folded += _folded("Every decision", f'<div class="scroll"><table>{header}{rows}</table></div>')
    if findings.run:
        folded += _folded("In words", f"<pre>{escape(reading([findings.run]))}</pre>")
    return folded


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary><section>{content}</section></details>"

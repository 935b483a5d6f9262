"""`fim.txt`: FIM metrics put into words."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from calibration.fim.runs import Run
from calibration.fim.scores import CATEGORIES, category, potential_of, run_scores

HOTSPOTS = 5
COMPARED = ("trace", "eigmax", "cond", "energy_r8", "effective_rank")

GUIDE = """\
trace           How undecided attention is on average: 1 - sum of p^2. Near 0: every query reads one token. Near 1: it
                reads many, and an error in any key moves the output. Above 0.95 a head counts as critical.
eigmax          The most sensitive direction in token space. Above 0.15 one pattern, as a rule the first token against
                the rest, rules the head.
cond            eigmax over the smallest positive eigenvalue. Large: a few stiff directions and many soft ones.
energy_rK       Share of the trace in the K largest eigenvalues. effective_rank: the fewest that hold 90 %.
key_*, value_*  The same of the Fisher information of predictions about a key or value: what an error there costs.
                This is what the planner `budget` acts on.
df              (sum of eigenvalues)^2 / sum of squares: how many directions are in use.
k90, k95, k99   Dimensions that hold so much of the variance; compression: all dimensions / k95. Weights use most of their
                directions and do not compress; the activations that they make, and a cache keeps, use few.

critical        Trace above 0.95.
high_potential  Not critical, and a compression potential above 70: uneven and concentrated.
moderate        All others.
Categories are a reading of attention, not a measurement of loss: docs/planning.md has what plans made from them cost."""


def reading(runs: Sequence[Run]) -> str:
    """The whole text."""
    sections = [(f"Run {run.name}", _run_lines(run)) for run in runs]
    if len(runs) > 1:
        sections.append(("Runs compared", _comparison(runs)))
    sections.append(("Hotspots", _hotspots(runs)))
    sections += [(f"Heads of {run.name}", _heads(run)) for run in runs]
    sections.append(("How to read this", iter(GUIDE.splitlines())))
    return "\n".join(line for title, lines in sections for line in (title, "=" * len(title), *lines, ""))


def _run_lines(run: Run) -> Iterator[str]:
    scores = run_scores(run)
    yield f"mean trace             {_number(scores['fim/trace_global_mean'], _trace)}"
    yield f"mean eigmax            {_number(scores['fim/eigmax_global_mean'])}"
    yield f"mean cond              {_number(scores['fim/cond_global_mean'], _cond)}"
    yield f"mean energy_r8         {_number(scores['fim/energy_r8_mean'], _energy)}"
    yield f"mean energy_r16        {_number(scores['fim/energy_r16_mean'], _energy)}"
    yield f"mean effective rank    {_number(scores['fim/effective_rank'])}"
    yield f"compression potential  {_number(scores['fim/compression_potential'])} of 100"
    yield f"efficiency score       {_number(scores['fim/efficiency_score'])} of 100"
    for metric, words in (("df", "directions in use (df)"), ("compression", "dimensions / k95")):
        weights, activations = (run.overall(f"{kind}_{metric}") for kind in ("weight", "activation"))
        if not math.isnan(weights):
            yield f"{words:23s}weights {weights:.4g}, activations {activations:.4g}"


def _comparison(runs: Sequence[Run]) -> Iterator[str]:
    """Of every metric the runs of the least and the largest mean."""
    for metric in COMPARED:
        known = [(run.overall(metric), run.name) for run in runs if not math.isnan(run.overall(metric))]
        if len(known) > 1:
            (least, low), (most, high) = min(known), max(known)
            ratio = f", {most / least:.2f}x" if least > 0 else ""
            yield f"mean {metric:15s} from {least:.4g} ({low}) to {most:.4g} ({high}){ratio}"


def _hotspots(runs: Sequence[Run]) -> Iterator[str]:
    for metric in ("trace", "eigmax", "cond"):
        found = [
            (values[metric], f"{run.name}: layer {layer}, head {head}")
            for run in runs
            for (layer, head), values in run.heads().items()
            if metric in values
        ]
        for value, place in sorted(found, reverse=True)[:HOTSPOTS]:
            yield f"{metric:7s} {value:10.4g}  {place}"


def _heads(run: Run) -> Iterator[str]:
    """How many heads are in each category, then every head with its numbers."""
    heads = sorted(run.heads().items())
    counts = Counter(category(values) for _, values in heads)
    yield ", ".join(f"{counts[name]} {name}" for name in CATEGORIES)
    for (layer, head), values in heads:
        numbers = "  ".join(f"{metric} {values.get(metric, math.nan):9.4g}" for metric in COMPARED)
        yield f"{layer:3d}/{head:<3d} {category(values):15s} potential {potential_of(values):5.1f}  {numbers}"


def _number(value: float, words: Callable[[float], str] | None = None) -> str:
    if math.isnan(value):
        return "not in the record"
    return f"{value:.4g}" + (f"  ({words(value)})" if words else "")


def _trace(value: float) -> str:
    return (
        "attention is settled on few tokens" if value < 0.5 else "attention is spread" if value < 0.95 else "critical"
    )


def _cond(value: float) -> str:
    steps = ((1e3, "even"), (1e5, "somewhat uneven"), (1e7, "uneven: some very stiff directions"))
    return next((words for limit, words in steps if value < limit), "very uneven: few directions rule")


def _energy(value: float) -> str:
    steps = ((0.8, "spread over many directions"), (0.9, "concentrated"), (0.95, "low effective rank"))
    return next((words for limit, words in steps if value < limit), "very low effective rank")

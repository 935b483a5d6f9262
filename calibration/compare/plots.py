"""Tables and pictures of a comparison: CSV, and growth of perplexity over bits per element as PNG and HTML."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import pandas
import plotly.graph_objects as go
from matplotlib.figure import Figure

from calibration.compare.harness import Row
from calibration.compare.run import OURS
from vllm_kvsplice.errors import KVSpliceError

# A logarithm has no place for growth at or below nothing: what is less is drawn here.
FLOOR_PERCENT = 0.01
BITS, GROWTH = "bits per element", f"growth of perplexity, % (at least {FLOOR_PERCENT})"
# Colour, and mark in Matplotlib and in plotly: colours that those who see them differently can tell apart (Okabe and Ito).
OUR_STYLES = (("black", "o", "circle"), ("black", "*", "star"), ("black", "p", "pentagon"))
STYLES = (
    ("#0072b2", "s", "square"),
    ("#d55e00", "^", "triangle-up"),
    ("#009e73", "v", "triangle-down"),
    ("#cc79a7", "D", "diamond"),
    ("#e69f00", "P", "cross"),
    ("#56b4e9", "X", "x"),
    ("#7f7f7f", "<", "triangle-left"),
    ("#a05d2c", ">", "triangle-right"),
)
NAMES = ("comparison.png", "comparison.html")


def save_rows(rows: Sequence[Row], json_file: Path | None, csv_file: Path | None) -> None:
    """Write a list of objects, a table with a header, both or neither."""
    table = pandas.DataFrame(map(asdict, rows))
    for file in filter(None, (json_file, csv_file)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if json_file:
        table.to_json(json_file, orient="records", indent=1)
    if csv_file:
        table.to_csv(csv_file, index=False)


def check_plot(target: Path) -> None:
    """Raise `KVSpliceError` unless `target` names a PNG, an HTML page or a directory."""
    if target.suffix not in ("", ".png", ".html"):
        raise KVSpliceError(f"{target} is neither .png nor .html nor a directory; name one of them for --plot")


def save_plots(rows: Sequence[Row], target: Path) -> list[Path]:
    """Draw into a .png or .html file, or both into a directory; returns what was written."""
    files = [target] if target.suffix else [target / name for name in NAMES]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            picture(rows).savefig(file, dpi=110)
        else:
            interactive(rows).write_html(file, include_plotlyjs=True)
    return files


def picture(rows: Sequence[Row]) -> Figure:
    """For paper and README: white, 9 by 6 inches."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for family, points, (colour, mark, _) in _curves(rows):
        axes.plot(
            [row.bits_per_element for row in points],
            [max(row.change_percent, FLOOR_PERCENT) for row in points],
            color=colour,
            marker=mark,
            linewidth=2.2 if family == OURS else 1,
            label=family,
        )
    axes.set(xlabel=BITS, ylabel=GROWTH, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def interactive(rows: Sequence[Row]) -> go.Figure:
    """The same with the name and the figures of every point; needs no network."""
    figure = go.Figure()
    for family, points, (colour, _, symbol) in _curves(rows):
        figure.add_scatter(
            x=[row.bits_per_element for row in points],
            y=[max(row.change_percent, FLOOR_PERCENT) for row in points],
            mode="lines+markers",
            name=family,
            line={"color": colour, "width": 3 if family == OURS else 1.2},
            marker={"symbol": symbol, "size": 9},
            text=[f"{row.method}: {row.bits_per_element:.2f} bits, {row.change_percent:+.2f} %" for row in points],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_layout(template="plotly_white", xaxis_title=BITS, yaxis_title=GROWTH, yaxis_type="log")
    return figure


def _curves(rows: Sequence[Row]) -> list[tuple[str, list[Row], tuple[str, str, str]]]:
    """Family, its points by size, and its style."""
    peers = dict.fromkeys(row.family for row in rows if not row.ours)
    ours = sorted({row.family for row in rows if row.ours})
    styles = dict(zip(peers, cycle(STYLES), strict=False)) | dict(zip(ours, cycle(OUR_STYLES), strict=False))
    by_size = sorted(rows, key=lambda row: row.bits_per_element)
    return [(family, [row for row in by_size if row.family == family], style) for family, style in styles.items()]

"""Pictures of FIM metrics and plans, as plotly figures. Colours of text and grids belong to the page (`report.html`)."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from calibration.fim.runs import PREFIX, Run
from calibration.fim.scores import category, potential_of
from calibration.planners.files import PlanFile
from calibration.planners.tiers import TierRule
from vllm_kvsplice.engines import DEFAULT_WINDOW
from vllm_kvsplice.layout import MAX_WIDTH

# Seen on white and on near black alike.
DEPTH = [[0, "#4361ee"], [0.33, "#2a9d8f"], [0.67, "#e9a23b"], [1, "#e4572e"]]
HEAT = "Viridis"
# Marks that stay apart for those who see colours differently: shape as well as hue.
MARKS = {"critical": ("x", "#e4572e"), "high_potential": ("circle", "#2a9d8f")}
_MAP = re.compile(rf"{PREFIX}layer(\d+)/[^/]+_(weight|activation)_df")
LENGTHS = tuple(1 << power for power in range(9, 18))


def compression_heatmap(run: Run) -> go.Figure:
    """Compression potential of every head, layers down and heads across; critical and high-potential heads are marked."""
    heads = run.heads()
    layers, columns = sorted({layer for layer, _ in heads}), sorted({head for _, head in heads})
    shown = [[potential_of(heads.get((layer, head), {})) for head in columns] for layer in layers]
    words = [[_head_words(heads.get((layer, head), {})) for head in columns] for layer in layers]
    figure = go.Figure(
        go.Heatmap(
            z=shown,
            x=columns,
            y=layers,
            text=words,
            zmin=0,
            colorscale=HEAT,
            colorbar={"title": "potential", "thickness": 12},
            hovertemplate="layer %{y}, head %{x}: potential %{z:.0f}<br>%{text}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    for name, (symbol, colour) in MARKS.items():
        marked = [place for place, values in heads.items() if category(values) == name]
        figure.add_scatter(
            x=[head for _, head in marked],
            y=[layer for layer, _ in marked],
            mode="markers",
            name=name,
            marker={"symbol": symbol, "color": colour, "size": 8, "line": {"width": 1, "color": "white"}},
            hoverinfo="skip",
            # A trace without points would not be in the legend, and its absence says something.
            visible=True if marked else "legendonly",
        )
    figure.update_xaxes(title="query head", dtick=max(1, len(columns) // 12), showgrid=False)
    figure.update_yaxes(title="layer", autorange="reversed", showgrid=False)
    return figure


def _head_words(values: dict[str, float]) -> str:
    named = ("trace", "eigmax", "cond", "energy_r8", "effective_rank")
    return "<br>".join([category(values), *(f"{name} {values[name]:.4g}" for name in named if name in values)])


def condition_scatter(run: Run) -> go.Figure:
    """Condition number (log) against trace of every head; colour is depth, size the effective rank, quadrants are named."""
    rule = TierRule()
    points = [(place, v) for place, v in sorted(run.heads().items()) if v.get("cond", 0) > 0 and "trace" in v]
    ranks = [values.get("effective_rank", 1.0) for _, values in points]
    figure = go.Figure(
        go.Scatter(
            x=[values["cond"] for _, values in points],
            y=[values["trace"] for _, values in points],
            text=[f"layer {layer}, head {head}<br>{_head_words(values)}" for (layer, head), values in points],
            mode="markers",
            hovertemplate="%{text}<extra></extra>",
            marker={
                "color": [layer for (layer, _), _ in points],
                "colorscale": DEPTH,
                "colorbar": {"title": "layer", "thickness": 12},
                "size": [max(rank, 1.0) for rank in ranks],
                "sizemode": "area",
                "sizeref": 2 * max(ranks, default=1.0) / 16**2,
                "sizemin": 4,
                "opacity": 0.8,
            },
            showlegend=False,
        )
    )
    _name_quadrants(figure, rule)
    lowest = min((values["cond"] for _, values in points), default=1.0)
    highest = max(10 * rule.moderate_cond, *(values["cond"] for _, values in points), 1.0)
    figure.update_xaxes(title="condition number", type="log", range=[math.log10(lowest / 2), math.log10(highest * 2)])
    figure.update_yaxes(title="trace", range=[-0.06, 1.06])
    return figure


def _name_quadrants(figure: go.Figure, rule: TierRule) -> None:
    """Lines at the thresholds of `rule`, and what heads on their four sides are."""
    figure.add_vline(x=rule.moderate_cond, line_dash="dot", line_color="#888")
    figure.add_hline(y=rule.compressible_trace, line_dash="dot", line_color="#888")
    corners = {
        (0.01, 0.99): "important, even",
        (0.99, 0.99): "important, uneven",
        (0.01, 0.01): "little at stake",
        (0.99, 0.01): "best targets",
    }
    for (x, y), words in corners.items():
        figure.add_annotation(
            xref="paper", yref="paper", x=x, y=y, text=words, showarrow=False, opacity=0.75, font={"size": 11}
        )


def spectra(run: Run, kind: str) -> go.Figure:
    """Eigenvalues of every layer as shares of the largest, mean over its heads; `kind` is "attention", "key" or "value"."""
    ending = "spectrum" if kind == "attention" else f"{kind}_spectrum"
    by_layer: dict[int, list[list[float]]] = {}
    for name, values in run.spectra.items():
        place, _, found = name.removeprefix(f"{PREFIX}layer").rpartition("/")
        if found == ending:
            by_layer.setdefault(int(place.split("/")[0]), []).append(values)
    figure = go.Figure()
    last = max(by_layer, default=1) or 1
    for layer, rows in sorted(by_layer.items()):
        shares = [_mean(row[i] / row[0] for row in rows if row[0] > 0) for i in range(len(rows[0]))]
        colour = sample_colorscale(DEPTH, layer / last)[0]
        figure.add_scatter(
            x=list(range(1, len(shares) + 1)),
            y=[max(share, 1e-9) for share in shares],
            mode="lines",
            line={"color": colour, "width": 1.2},
            hovertemplate=f"layer {layer}, eigenvalue %{{x}}: %{{y:.2g}}<extra></extra>",
            showlegend=False,
        )
    # Carries the scale of the colours.
    marker = {
        "colorscale": DEPTH,
        "cmin": 0,
        "cmax": last,
        "color": [0],
        "colorbar": {"title": "layer", "thickness": 12},
    }
    figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False)
    figure.update_xaxes(title="eigenvalue, largest first")
    figure.update_yaxes(title="share of the largest", type="log", exponentformat="power", dtick=1)
    return figure


def directions_of_maps(run: Run) -> go.Figure:
    """Directions in use (df) of weights and of activations, layer by layer, mean over the maps inside attention."""
    figure = go.Figure()
    for kind, colour in (("weight", "#8d99ae"), ("activation", "#2a9d8f")):
        by_layer: dict[int, list[float]] = {}
        for name, value in run.metrics.items():
            found = _MAP.fullmatch(name)
            if found and found[2] == kind:
                by_layer.setdefault(int(found[1]), []).append(value)
        layers = sorted(by_layer)
        figure.add_bar(
            x=layers, y=[_mean(by_layer[layer]) for layer in layers], name=f"{kind}s", marker={"color": colour}
        )
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="directions in use (df)")
    return figure


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else math.nan


def bits_map(plan: PlanFile) -> go.Figure:
    """Width of every group of 8 latents: a layer a row, head by head, keys then values."""
    rows, words = [], []
    for layer in plan.layers:
        kinds = [("K", [(h, h.key) for h in layer.heads]), ("V", [(h, h.value) for h in layer.heads])]
        cells = [(kind, h, group, w) for kind, heads in kinds for h, widths in heads for group, w in enumerate(widths)]
        rows.append([width for *_, width in cells])
        words.append([f"{kind} of head {h.head}, group {group}<br>{h.reason}" for kind, h, group, _ in cells])
    groups = len(plan.layers[0].heads[0].key)
    heads = len(plan.layers[0].heads)
    figure = go.Figure(
        go.Heatmap(
            z=rows,
            y=[layer.layer for layer in plan.layers],
            text=words,
            zmin=0,
            zmax=MAX_WIDTH,
            colorscale=HEAT,
            colorbar={"title": "bits", "thickness": 12, "dtick": 2},
            hovertemplate="layer %{y}: %{z} bits<br>%{text}<extra></extra>",
        )
    )
    for border in range(1, 2 * heads):
        figure.add_vline(x=border * groups - 0.5, line_color="white", line_width=3 if border == heads else 1)
    ticks = [(i + 0.5) * groups - 0.5 for i in range(2 * heads)]
    names = [f"{kind}{h.head}" for kind in "KV" for h in plan.layers[0].heads]
    figure.update_xaxes(tickvals=ticks, ticktext=names, title="keys, then values, head by head")
    figure.update_yaxes(title="layer", autorange="reversed")
    return figure


def rate_distortion(plan: PlanFile) -> go.Figure:
    """Expected growth of perplexity by size, under the best plan for each, and this plan."""
    bits = [16 * point.bytes_per_token / plan.baseline_bytes_per_token for point in plan.curve]
    figure = go.Figure(
        go.Scatter(
            x=bits,
            y=[point.expected_percent for point in plan.curve],
            mode="lines",
            name="budget, any size",
            line={"color": "#4361ee", "width": 2},
            hovertemplate="%{x:.2f} bits: %{y:+.2f} %<extra></extra>",
        )
    )
    figure.add_scatter(
        x=[plan.bits_per_element],
        y=[plan.expected_percent],
        mode="markers",
        name=f"this plan ({plan.planner})",
        marker={"size": 13, "symbol": "star", "color": "#e4572e"},
        hovertemplate="%{x:.2f} bits: %{y:+.2f} %<extra></extra>",
    )
    figure.update_xaxes(title="bits per element")
    figure.update_yaxes(title="expected growth of perplexity, %", type="log", dtick=1)
    return figure


def expected_and_measured(rows: Sequence[dict[str, float | str]]) -> go.Figure:
    """Growth of perplexity that was expected and measured, a point a plan; rows as ``make bench-planners`` writes them."""
    figure = go.Figure()
    symbols = ("circle", "square", "diamond", "cross", "triangle-up", "star")
    colours = ("#4361ee", "#e4572e", "#2a9d8f", "#b5838d", "#f4a261", "#8d99ae")
    for index, planner in enumerate(dict.fromkeys(str(row["planner"]) for row in rows)):
        own = [row for row in rows if row["planner"] == planner]
        figure.add_scatter(
            x=[row["predicted_percent"] for row in own],
            y=[row["change_percent"] for row in own],
            text=[f"{row['bytes_per_token']} bytes per token" for row in own],
            mode="markers",
            name=planner,
            marker={"size": 10, "symbol": symbols[index % 6], "color": colours[index % 6]},
            hovertemplate="%{text}<br>expected %{x:+.2f} %, measured %{y:+.2f} %<extra></extra>",
        )
    values = [float(row[name]) for row in rows for name in ("predicted_percent", "change_percent")]
    ends = [min((v for v in values if v > 0), default=0.1) / 1.5, max(values) * 1.5]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name="equal", line={"dash": "dot", "color": "#888"}, hoverinfo="skip"
    )
    figure.update_xaxes(title="expected, %", type="log", dtick=1)
    figure.update_yaxes(title="measured, %", type="log", dtick=1)
    return figure


def memory(plan: PlanFile) -> go.Figure:
    """Memory of one sequence by its length, dense and under the plan with an exact window."""
    dense, packed = plan.baseline_bytes_per_token, plan.bytes_per_token
    sizes: dict[str, tuple[str, Callable[[int], float]]] = {
        "dense, 16 bits": ("#8d99ae", lambda tokens: tokens * dense),
        f"this plan, window {DEFAULT_WINDOW}": (
            "#4361ee",
            lambda tokens: tokens * packed + min(tokens, DEFAULT_WINDOW) * dense,
        ),
    }
    figure = go.Figure()
    for name, (colour, size) in sizes.items():
        figure.add_scatter(
            x=list(LENGTHS),
            y=[size(tokens) / 2**20 for tokens in LENGTHS],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            hovertemplate="%{x} tokens: %{y:.1f} MiB<extra></extra>",
        )
    figure.update_xaxes(
        title="tokens of a sequence",
        type="log",
        tickvals=LENGTHS[::2],
        ticktext=[f"{n / 1024:g}k" for n in LENGTHS[::2]],
    )
    figure.update_yaxes(title="MiB", type="log", dtick=1)
    return figure

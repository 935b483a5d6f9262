"""Planners beside each other at equal size, and what they expect beside what is measured, for docs/planning.md.

    python -m benchmarks.planners [--text FIT_TEXT] [--held-out TEXT]

The default model is measured once; every plan is then judged as `kvsplice eval` does (mode `all`, no exact window). Rows go
to build/bench/planners.json.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pandas
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from calibration.evaluate import compressing_tap, evaluate
from calibration.models import default_model, load_model
from calibration.plan import Plan
from calibration.planners import make_plan
from calibration.planners.tiers import TierRule
from calibration.progress import steps
from calibration.recipe import CalibrationConfig
from calibration.study import Study, study
from calibration.text import read_text, token_windows

# Bits per element at which all planners are compared.
SIZES = (2.0, 3.0, 4.0)
# Further sizes of `budget`, for the comparison of expectations.
MORE = (1.5, 2.5, 5.0)
PLANNERS = {
    "uniform": {"planner": "uniform"},
    "tiers": {"planner": "tiers"},
    "tiers, clamped cond": {"planner": "tiers", "tiers": TierRule(cond_floor=1e-8)},
    "budget": {"planner": "budget"},
}
RESULT = Path("build/bench/planners.json")
STATISTICS = Path("build/bench/planners.safetensors")

console = Console()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default="pydoc", help="to calibrate on, as for kvsplice calibrate")
    parser.add_argument("--held-out", default="pydoc", help="to judge on, as for kvsplice eval")
    parser.add_argument("--windows", type=int, default=3, help="of held-out text")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window")
    options = parser.parse_args()
    model = str(default_model())
    measured = study(model, CalibrationConfig(text=options.text), STATISTICS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = token_windows(tokenizer, read_text(options.held_out), options.windows, options.context)
    judged, _ = load_model(model, torch.float32)
    rows = []
    for name, plan in plans(measured):
        artifact = measured.artifact(plan)
        with steps(f"{name}, {plan.bytes_per_token} bytes", len(windows)) as progress:
            change = evaluate(judged, compressing_tap(artifact.codecs, "all"), windows, progress).change_percent
        expected = 100 * plan.expected_increase
        row = {"planner": name, "bytes_per_token": artifact.bytes_per_token, "predicted_percent": expected}
        rows.append(row | {"change_percent": change})
        # After every plan, so that an interruption costs one.
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    show(pandas.DataFrame(rows))


def plans(measured: Study) -> Iterator[tuple[str, Plan]]:
    """Every planner at every size, then `tiers` as its rule says, then `budget` at further sizes."""
    for bits in SIZES:
        for name, settings in PLANNERS.items():
            config = CalibrationConfig(bits=bits, **settings)
            yield name, make_plan(measured.evidence, config, measured.budget_for(bits))
    for name in ("tiers", "tiers, clamped cond"):
        yield f"{name}, own size", make_plan(measured.evidence, CalibrationConfig(**PLANNERS[name]), None)
    for bits in MORE:
        yield "budget", make_plan(measured.evidence, CalibrationConfig(bits=bits), measured.budget_for(bits))


def show(rows: pandas.DataFrame) -> None:
    """Print the table and the rank correlation of expectation and measurement."""
    table = Table("planner", "bytes per token", "expected, %", "measured, %")
    for row in rows.itertuples():
        table.add_row(
            row.planner, str(row.bytes_per_token), f"{row.predicted_percent:+.2f}", f"{row.change_percent:+.2f}"
        )
    console.print(table)
    correlation = rows["predicted_percent"].rank().corr(rows["change_percent"].rank())
    console.print(f"Rank correlation of expected and measured over {len(rows)} plans: {correlation:.3f}")
    console.print(f"Wrote {RESULT}")


if __name__ == "__main__":
    main()

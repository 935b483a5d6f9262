"""Scores and categories of heads, on the scales of the field's tools."""

import math
from collections.abc import Mapping

from calibration.fim.runs import Run
from calibration.planners.tiers import TierRule

CATEGORIES = ("high_potential", "critical", "moderate")
# Compression potential above which a head counts as a good target.
HIGH_POTENTIAL = 70.0


def compression_potential(cond: float, energy_r8: float) -> float:
    """0 to 100: how far attention's Fisher matrix is from even; cond of 1e3 counts nothing and 1e7 in full.

    NaN where cond or the share of the eight largest eigenvalues is unknown.
    """
    if math.isnan(cond) or math.isnan(energy_r8):
        return math.nan
    unevenness = (math.log10(max(cond, 1.0)) - 3) / 4
    return 100 * min(max(unevenness, 0.0), 1.0) * energy_r8


def efficiency_score(trace: float) -> float:
    """0 to 100: 100 where attention is settled (trace 0), 0 where it is spread over many tokens (trace 1)."""
    return 100 * (1 - trace)


def potential_of(head: Mapping[str, float]) -> float:
    """`compression_potential` of a head's metrics."""
    return compression_potential(head.get("cond", math.nan), head.get("energy_r8", math.nan))


def category(head: Mapping[str, float]) -> str:
    """One of `CATEGORIES`: critical by its trace, else by its potential."""
    if head.get("trace", 0.0) > TierRule().critical_trace:
        return "critical"
    return "high_potential" if potential_of(head) > HIGH_POTENTIAL else "moderate"


def run_scores(run: Run) -> dict[str, float]:
    """The single numbers of a run, named as they stand in W&B."""
    cond, trace, energy = (run.overall(metric) for metric in ("cond", "trace", "energy_r8"))
    return {
        "fim/compression_potential": compression_potential(cond, energy),
        "fim/efficiency_score": efficiency_score(trace),
        "fim/effective_rank": run.overall("effective_rank"),
        "fim/trace_global_mean": trace,
        "fim/eigmax_global_mean": run.overall("eigmax"),
        "fim/cond_global_mean": cond,
        "fim/energy_r8_mean": energy,
        "fim/energy_r16_mean": run.overall("energy_r16"),
    }

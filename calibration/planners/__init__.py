"""Planners: from measurements to one `calibration.plan.Plan`, with the reason of every decision.

`budget` puts bits where the loss feels them, `tiers` follows the published rule on attention's Fisher matrix, `uniform`
treats all heads alike, `manual` does as it is told. docs/planning.md compares them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from calibration.fim.runs import read_runs
from calibration.plan import Plan
from calibration.planners.budget import plan_by_fisher
from calibration.planners.files import is_plan_file, load_plan_file, read_plan
from calibration.planners.manual import plan_manual, read_manual
from calibration.planners.tiers import Metrics, TierRule, plan_tiers
from calibration.planners.uniform import plan_uniform
from vllm_kvsplice.names import PlannerName


class PlannerSettings(BaseModel):
    """Who plans.

    Attributes:
        planner: `budget`, `tiers`, `uniform`, or `manual`.
        plan: for `manual`, a JSON configuration (configs/README.md) or a plan that ``kvsplice plan`` wrote.
        fim: for `tiers`, FIM metrics that ``kvsplice fim`` wrote or imported; measured on the spot without.
        tiers: thresholds of `tiers`.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    planner: PlannerName = "budget"
    plan: Path | None = None
    fim: Path | None = None
    tiers: TierRule = TierRule()


@dataclass(frozen=True)
class Evidence:
    """What planners decide on.

    Attributes:
        distortion: Fisher-weighted cost of each group at widths 0..8, [2, L, H, G, 9].
        layers: the model's numbers of the L layers.
        metrics: measures, or reads, the metrics of attention.

    """

    distortion: Tensor
    layers: tuple[int, ...]
    metrics: Callable[[], Metrics]


def check_files(settings: PlannerSettings) -> None:
    """Raise `KVSpliceError` if a file that will be read is none of its kind, before minutes of measuring."""
    if settings.plan:
        load_plan_file(settings.plan) if is_plan_file(settings.plan) else read_manual(settings.plan)
    if settings.fim:
        read_runs(settings.fim)


def make_plan(evidence: Evidence, settings: PlannerSettings, budget_bytes: int | None) -> Plan:
    """The plan of `settings.planner`.

    Args:
        evidence: what was measured.
        settings: who plans.
        budget_bytes: bytes per token over all L layers; None for `manual`, and for `tiers` as the rule says.

    Raises:
        KVSpliceError: the budget or the given configuration does not fit the model.

    """
    if settings.planner == "manual":
        assert settings.plan is not None
        if is_plan_file(settings.plan):
            return read_plan(settings.plan, evidence.distortion, evidence.layers)
        return plan_manual(evidence.distortion, evidence.layers, read_manual(settings.plan))
    if settings.planner == "tiers":
        return plan_tiers(evidence.distortion, evidence.layers, evidence.metrics(), settings.tiers, budget_bytes)
    assert budget_bytes is not None
    planner = plan_uniform if settings.planner == "uniform" else plan_by_fisher
    return planner(evidence.distortion, budget_bytes)

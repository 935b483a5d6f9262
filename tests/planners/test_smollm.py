"""On the real model: Fisher-driven planning beats equal bits in the same bytes, as it expected to."""

import pytest
import torch

from calibration.evaluate import compressing_tap, evaluate
from calibration.models import load_model
from calibration.planners import make_plan
from calibration.recipe import CalibrationConfig
from calibration.study import Study

pytestmark = pytest.mark.model


def test_the_same_bytes_cost_less_where_fisher_information_plans(smollm_study: Study) -> None:
    # On half of the usual text: the figures in docs/planning.md are better.
    measured = smollm_study
    model, _ = load_model(measured.source, torch.float32)
    costs, expected = {}, {}
    for planner in ("budget", "uniform"):
        plan = make_plan(measured.evidence, CalibrationConfig(bits=3, planner=planner), measured.budget_for(3))
        assert plan.bytes_per_token == 4320
        artifact = measured.artifact(plan)
        costs[planner] = evaluate(
            model, compressing_tap(artifact.codecs, "all"), measured.held_out.quality
        ).change_percent
        expected[planner] = 100 * plan.expected_increase
    print(f"measured {costs}, expected {expected}")
    assert 1.5 * costs["budget"] < costs["uniform"]
    assert expected["budget"] < expected["uniform"]
    assert all(expected[planner] / 3 < costs[planner] < 3 * expected[planner] for planner in costs)

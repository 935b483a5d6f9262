"""Planners on a random model of GPT-2's size, which has none of the structure that training makes.

Its perplexity says nothing: it predicts at random, and noise makes it neither better nor worse. So damage is measured as
the divergence of its predictions from those with a dense cache; `pytest -s` prints it.
"""

import pytest
import torch

from calibration.evaluate import compressing_tap, evaluate
from calibration.models import load_model
from calibration.plan import Plan
from calibration.planners import make_plan
from calibration.recipe import CalibrationConfig
from calibration.study import Study, study
from calibration.text import token_windows
from tests.models import TEXT, tiny_model, tiny_tokenizer

GPT2 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "n_inner": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
PLANNERS = ("uniform", "tiers", "budget")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("control")
    (folder / "text.txt").write_text(TEXT)
    config = CalibrationConfig(text=str(folder / "text.txt"), tokens=512, context=128)
    return study(str(tiny_model("gpt2", folder / "model", **GPT2)), config)


@pytest.fixture(scope="module")
def damage(measured):
    """KL divergence in nats per token of predictions under a plan from those with a dense cache, position 0 exact."""
    model, _ = load_model(measured.source, torch.float32)
    windows = token_windows(tiny_tokenizer(), TEXT[-20000:], 2, 128)

    def of(plan: Plan) -> float:
        return evaluate(model, compressing_tap(measured.artifact(plan).codecs, "all"), windows).divergence

    return of


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0])
def test_fisher_does_less_damage_than_any_other_plan_of_the_same_size(measured, damage, bits):
    plans = {}
    for planner in PLANNERS:
        config = CalibrationConfig(bits=bits, planner=planner)
        plans[planner] = make_plan(measured.evidence, config, measured.budget_for(bits))
    assert {plan.bytes_per_token for plan in plans.values()} == {int(bits * 12 * 2 * 768 / 8)}
    found = {planner: damage(plan) for planner, plan in plans.items()}
    print(f"{bits:g} bits: {found}")
    assert 0 < found["budget"] < 0.8 * min(found["uniform"], found["tiers"])

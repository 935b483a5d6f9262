"""What planners promise: their budget, their rule, and the reason of every decision."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.plan import Plan, left_by, spread
from calibration.planners.budget import plan_by_fisher
from calibration.planners.search import SEARCH_BITS, search_bits
from calibration.planners.tiers import TierRule, plan_tiers, tier_of
from calibration.planners.uniform import plan_uniform
from tests.calibration.test_plan import convex
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP, MAX_WIDTH, TOKEN_ALIGNMENT

# kinds, layers, KV heads, groups.
SHAPES = [(2, 4, 3, 8), (2, 3, 2, 4), (2, 5, 1, 16)]
CRITICAL = {"trace": 0.97, "cond": 1e8, "eigmax": 0.1}
HIGH_COND = {"trace": 0.5, "cond": 2e7, "eigmax": 0.1}
MODERATE_COND = {"trace": 0.93, "cond": 2e7, "eigmax": 0.1}
OTHER = {"trace": 0.5, "cond": 1e5, "eigmax": 0.1}
TIERS = (CRITICAL, HIGH_COND, MODERATE_COND, OTHER)


def metrics(shape: tuple[int, ...], seed: int = 0, group: int = 1) -> dict[tuple[int, int], dict[str, float]]:
    """A tier for each of `group` query heads of every KV head, drawn at random."""
    draws = torch.randint(len(TIERS), (shape[1], shape[2] * group), generator=torch.Generator().manual_seed(seed))
    return {(layer, head): TIERS[draws[layer, head]] for layer in range(shape[1]) for head in range(shape[2] * group)}


def tiers(distortion: Tensor, budget: int | None = None, seed: int = 0, **rule: Any) -> Plan:
    shape = tuple(distortion.shape)
    return plan_tiers(distortion, range(shape[1]), metrics(shape, seed), TierRule(**rule), budget)


@st.composite
def instances(draw) -> tuple[Tensor, int, int]:
    """Distortions, a budget between 1.5 and 8 bits, and a seed."""
    shape, seed = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 2**32))
    groups = torch.Size(shape).numel()
    return convex(shape, seed), draw(st.integers(int(1.5 * groups), MAX_WIDTH * groups)), seed


@settings(max_examples=60, deadline=None)
@given(instances())
def test_every_planner_keeps_to_its_budget(instance):
    distortion, budget, seed = instance
    for plan in (plan_by_fisher(distortion, budget), plan_uniform(distortion, budget), tiers(distortion, budget, seed)):
        assert plan.bytes_per_token <= budget, plan.planner
        assert plan.widths.min() >= 0
        assert plan.widths.max() <= MAX_WIDTH
        assert plan.distortion == pytest.approx(left_by(distortion, plan.widths))


@settings(max_examples=60, deadline=None)
@given(instances())
def test_budget_and_tiers_leave_less_than_a_step_unspent(instance):
    distortion, budget, seed = instance
    for plan in (plan_by_fisher(distortion, budget), tiers(distortion, budget, seed)):
        assert budget - plan.bytes_per_token < TOKEN_ALIGNMENT, plan.planner
    # Tiers leave no padding empty either, unless everything has 8 bits.
    layer_bytes = plan.widths.sum((0, 2, 3))
    assert ((plan.layer_bytes == layer_bytes) | (layer_bytes == MAX_WIDTH * plan.widths[:, 0].numel())).all()


@settings(max_examples=60, deadline=None)
@given(instances())
def test_no_planner_leaves_less_distortion_in_the_same_bytes_than_budget(instance):
    distortion, budget, seed = instance
    for other in (plan_uniform(distortion, budget), tiers(distortion, budget, seed)):
        if int(other.widths.sum()) == other.bytes_per_token:
            assert plan_by_fisher(distortion, other.bytes_per_token).distortion <= other.distortion * (1 + 1e-5)


@settings(max_examples=30, deadline=None)
@given(instances())
def test_uniform_is_the_same_everywhere_and_no_wider_plan_fits(instance):
    distortion, budget, _ = instance
    plan = plan_uniform(distortion, budget)
    assert (plan.widths == plan.widths[:1, :1, :1]).all()
    assert plan.widths.max() - plan.widths.min() <= 1
    head_bytes, groups = int(plan.widths[0, 0, 0].sum()), distortion.shape[3]
    if head_bytes < groups * MAX_WIDTH:
        assert Plan(spread(head_bytes + 1, groups).expand_as(plan.widths), 0.0).bytes_per_token > budget


@pytest.mark.parametrize("planner", [plan_by_fisher, plan_uniform, tiers], ids=["budget", "uniform", "tiers"])
def test_every_head_has_its_reason(planner):
    plan = planner(convex((2, 4, 3, 8), 0), 600)
    assert len(plan.reasons) == 4
    assert all(len(heads) == 3 and all(len(reason) > 20 for reason in heads) for heads in plan.reasons)


@pytest.mark.parametrize("planner", [plan_by_fisher, plan_uniform, tiers])
def test_budget_below_the_smallest_pages_is_refused(planner):
    with pytest.raises(KVSpliceError, match=r"choose --bits between 1\.5 and 8"):
        planner(convex((2, 4, 3, 8), 0), 15)


def test_expectation_is_half_the_distortion_in_nats():
    assert Plan(torch.zeros(2, 1, 1, 1), 0.02).expected_increase == pytest.approx(0.01005, rel=1e-3)


class TestTiers:
    @pytest.mark.parametrize(
        ("head", "rank", "bits"), [(CRITICAL, 64, 8), (HIGH_COND, 8, 4), (MODERATE_COND, 16, 8), (OTHER, 32, 8)]
    )
    @pytest.mark.parametrize("dim", [64, 128, 32])
    def test_the_rule_gives_its_ranks_scaled_to_the_head(self, head, rank, bits, dim):
        groups = dim // GROUP
        plan = plan_tiers(convex((2, 1, 1, groups), 0), [5], {(5, 0): head}, TierRule())
        kept = max(1, rank * dim // 64 // GROUP)
        assert plan.widths.tolist() == [[[[bits] * kept + [0] * (groups - kept)]]] * 2

    def test_a_dominant_direction_has_eight_bits_whatever_the_tier(self):
        plan = plan_tiers(convex((2, 1, 1, 8), 0), [0], {(0, 0): HIGH_COND | {"eigmax": 0.16}}, TierRule())
        assert plan.widths[0, 0, 0].tolist() == [8] + [0] * 7
        assert "dominant direction (eigmax 0.16)" in plan.reasons[0][0]

    @pytest.mark.parametrize("careful", range(3))
    def test_a_kv_head_follows_the_most_careful_of_its_query_heads(self, careful):
        heads = {(0, head): CRITICAL if head == careful else HIGH_COND for head in range(6)}
        plan = plan_tiers(convex((2, 1, 2, 8), 0), [0], heads, TierRule())
        assert plan.widths[:, 0, 0].min() == 8
        assert plan.widths[:, 0, 1].count_nonzero() == 2

    def test_thresholds_can_be_set(self):
        assert tier_of(OTHER, 8, TierRule(critical_trace=0.4)).code_bytes == 64
        assert tier_of(OTHER, 8, TierRule(moderate_cond=1e4, moderate_cond_rank=24)).groups == 3
        assert tier_of(CRITICAL, 8, TierRule(critical_trace=1, compressible_trace=1, high_cond_bits=2)).code_bytes == 2

    def test_cond_may_be_read_as_the_published_tool_writes_it(self):
        even = {"trace": 0.5, "cond": 30.0, "eigmax": 0.12}
        assert tier_of(even, 8, TierRule()).groups == 4
        assert tier_of(even, 8, TierRule(cond_floor=1e-8)).groups == 1

    def test_heads_grow_in_proportion_to_their_tier(self):
        distortion, heads = convex((2, 1, 2, 8), 0), {(0, 0): OTHER, (0, 1): MODERATE_COND}
        small, large = (plan_tiers(distortion, [0], heads, TierRule(), budget) for budget in (48, 96))
        for plan in (small, large):
            of_head = plan.widths.sum((0, 1, 3)).tolist()
            assert of_head[0] == pytest.approx(2 * of_head[1], abs=16)

    def test_more_bytes_never_take_a_bit_away(self):
        distortion = convex((2, 4, 3, 8), 0)
        plans = [tiers(distortion, budget) for budget in range(256, 1537, 64)]
        # Padding is filled as it comes, so only what a layer holds in all grows for certain.
        assert all((b.layer_bytes >= a.layer_bytes).all() for a, b in pairwise(plans))

    @pytest.mark.parametrize("missing", ["trace", "cond", "eigmax"])
    def test_missing_metrics_are_named(self, missing):
        heads = {(0, h): {name: v for name, v in OTHER.items() if (h, name) != (1, missing)} for h in range(2)}
        with pytest.raises(KVSpliceError, match="lack trace, cond or eigmax of layer 0, head 1"):
            plan_tiers(convex((2, 1, 2, 8), 0), [0], heads, TierRule())

    def test_metrics_of_another_model_are_refused(self):
        with pytest.raises(KVSpliceError, match="have 3 heads in layer 0 and the model 2 KV heads"):
            plan_tiers(convex((2, 1, 2, 8), 0), [0], {(0, head): OTHER for head in range(3)}, TierRule())


class TestSearch:
    @settings(max_examples=40, deadline=None)
    @given(st.floats(1e-4, 0.4))
    def test_finds_the_fewest_bits_that_keep_to_the_limit(self, limit):
        tried = []

        def increase(bits: float) -> float:
            tried.append(bits)
            return 2**-bits

        found = search_bits(increase, max(limit, 2**-8))
        assert found == next(bits for bits in SEARCH_BITS if 2**-bits <= max(limit, 2**-8))
        assert len(tried) <= 6

    def test_a_limit_out_of_reach_is_refused(self):
        with pytest.raises(KVSpliceError, match=r"even at 8 bits perplexity grows by more than 0\.5 %"):
            search_bits(lambda bits: 0.01, 0.005)

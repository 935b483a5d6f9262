"""Planned widths keep to the budget and leave the least distortion in it."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.plan import Plan
from calibration.planners.budget import budget_for_bits, plan_budget
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP, MAX_WIDTH, TOKEN_ALIGNMENT, LayerLayout

SHAPES = [(2, 1, 1, 8), (2, 3, 2, 4), (2, 5, 3, 8), (2, 2, 1, 12)]


def convex(shape: tuple[int, ...], seed: int, decay: float = 0.3) -> Tensor:
    """Distortions [*shape, 9] as codebooks leave them: each bit takes off less than the one before."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.rand(*shape, 1, generator=generator) ** 3 * 10
    rate = decay + 0.2 * torch.rand(*shape, 1, generator=generator)
    return power * rate ** torch.arange(MAX_WIDTH + 1)


def falling(shape: tuple[int, ...], seed: int) -> Tensor:
    """Any distortions that fall with the width: with steps, plateaus and bends the wrong way."""
    generator = torch.Generator().manual_seed(seed)
    drops = torch.rand(*shape, MAX_WIDTH + 1, generator=generator) ** 4
    return (drops * (drops > 0.01)).flip(-1).cumsum(-1).flip(-1)


def total(distortion: Tensor, widths: Tensor) -> float:
    return float(distortion.gather(-1, widths[..., None]).sum())


def layer_bytes(plan: Plan) -> list[int]:
    return plan.widths.sum((0, 2, 3)).tolist()


def limits(shape: tuple[int, ...]) -> tuple[int, int]:
    """Smallest and largest budget."""
    kinds, layers, heads, groups = shape
    return layers * TOKEN_ALIGNMENT, kinds * layers * heads * groups * MAX_WIDTH


@st.composite
def instances(draw, make) -> tuple[Tensor, int]:
    """Distortions and a budget within their limits."""
    shape = draw(st.sampled_from(SHAPES))
    distortion = make(shape, draw(st.integers(0, 2**32)))
    return distortion, draw(st.integers(*limits(shape)))


@settings(max_examples=60, deadline=None)
@given(instances(falling) | instances(convex))
def test_budget_is_kept_and_filled_in_whole_steps_of_16_bytes(instance):
    distortion, budget = instance
    plan = plan_budget(distortion, budget)
    assert plan.widths.shape == distortion.shape[:-1]
    assert plan.widths.min() >= 0
    assert plan.widths.max() <= MAX_WIDTH
    assert all(size >= TOKEN_ALIGNMENT and size % TOKEN_ALIGNMENT == 0 for size in layer_bytes(plan))
    assert plan.bytes_per_token == sum(layer_bytes(plan))
    assert budget - TOKEN_ALIGNMENT < plan.bytes_per_token <= budget
    assert plan.distortion == pytest.approx(total(distortion, plan.widths), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(instances(falling) | instances(convex), st.integers(0, 2000))
def test_more_bytes_never_take_a_bit_away(instance, more):
    distortion, budget = instance
    largest = limits(distortion.shape[:-1])[1]
    small, large = plan_budget(distortion, budget), plan_budget(distortion, min(budget + more, largest))
    assert (large.widths >= small.widths).all()
    assert large.distortion <= small.distortion * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32), st.integers(1, MAX_WIDTH))
def test_never_worse_than_the_same_width_everywhere(shape, seed, width):
    distortion = convex(shape, seed)
    uniform = Plan(torch.full(shape, width), 0.0)
    plan = plan_budget(distortion, uniform.bytes_per_token)
    assert plan.bytes_per_token == uniform.bytes_per_token
    assert plan.distortion <= total(distortion, uniform.widths) * (1 + 1e-5)


def best_of_all(distortion: Tensor, budget: int) -> float:
    """The least distortion of any plan with whole 16-byte layers, by trying all of them."""
    layers = distortion.transpose(0, 1).flatten(1, 3)
    choices = []
    for layer in layers:
        best: dict[int, float] = {}
        for widths in product(range(MAX_WIDTH + 1), repeat=layer.shape[0]):
            size, left = sum(widths), sum(layer[i, w].item() for i, w in enumerate(widths))
            if size and size % TOKEN_ALIGNMENT == 0:
                best[size] = min(left, best.get(size, torch.inf))
        choices.append(best.items())
    return min(sum(left for _, left in c) for c in product(*choices) if sum(size for size, _ in c) <= budget)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [32, 40, 48, 64])
def test_no_plan_is_better(budget, seed):
    # Two layers of four groups: small enough to try all 9**4 plans of a layer.
    distortion = convex((2, 2, 1, 2), seed)
    assert plan_budget(distortion, budget).distortion == pytest.approx(best_of_all(distortion, budget), rel=1e-5)


def test_bits_go_where_they_count():
    distortion = convex((2, 4, 2, 4), 0, decay=0.25)
    distortion[:, 2] *= 1000
    distortion[1, :, 1, 3] *= 1e-9
    plan = plan_budget(distortion, budget_for_bits(3, distortion[..., 0].numel()))
    assert max(layer_bytes(plan)) == layer_bytes(plan)[2]
    assert (plan.widths[1, :, 1, 3] == 0).all()


def test_bit_that_pays_only_with_the_next_is_not_bought_on_its_own():
    distortion = torch.linspace(4, 0, MAX_WIDTH + 1).expand(2, 1, 1, 2, -1).clone()
    distortion[0, 0, 0, 0] = torch.tensor([9.0, 9.0] + [0.0] * 7)
    plan = plan_budget(distortion, TOKEN_ALIGNMENT)
    assert plan.widths[0, 0, 0, 0] != 1
    assert plan.distortion <= 9 + 12 - 16 * 0.5


@pytest.mark.parametrize("shape", [(2, 30, 3, 8), (2, 3, 2, 4), (2, 2, 8, 16), (2, 1, 1, 8)], ids=str)
def test_every_average_from_one_and_a_half_to_eight_bits_works(shape):
    distortion, groups = convex(shape, 0), torch.Size(shape).numel()
    for bits in torch.arange(1.5, 8.01, 0.25).tolist():
        budget = budget_for_bits(bits, groups)
        plan = plan_budget(distortion, budget)
        assert budget == int(bits * groups * GROUP) // 8
        assert budget - TOKEN_ALIGNMENT < plan.bytes_per_token <= budget


def test_eight_bits_are_eight_bits_everywhere():
    plan = plan_budget(convex((2, 3, 2, 4), 0), limits((2, 3, 2, 4))[1])
    assert (plan.widths == MAX_WIDTH).all()


def test_bytes_of_a_plan_are_those_of_its_layouts():
    widths = torch.randint(0, 9, (2, 5, 3, 7), generator=torch.Generator().manual_seed(0))
    # A layer without any bits still needs a page.
    widths[:, 3] = 0
    layouts = [LayerLayout(*(tuple(map(tuple, kind.tolist())) for kind in layer)) for layer in widths.transpose(0, 1)]
    assert Plan(widths, 0.0).bytes_per_token == sum(layout.token_bytes for layout in layouts)


@pytest.mark.parametrize("beyond", [-1, 1])
def test_budget_outside_the_possible_is_refused_with_the_range(beyond):
    shape = (2, 3, 2, 4)
    smallest, largest = limits(shape)
    budget = smallest - 1 if beyond < 0 else largest + 1
    with pytest.raises(KVSpliceError, match=rf"{budget} bytes .* outside {smallest}\.\.{largest}"):
        plan_budget(convex(shape, 0), budget)

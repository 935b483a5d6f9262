"""Transforms, codebooks and sinks of the closed-form codec, against their definitions and published optima."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.fit import FITS, FitByHead
from calibration.fit.codebooks import (
    Codebooks,
    fit_codebooks,
    lloyd_max,
    moments_of,
    read_back,
    rounded,
    squared_error,
    uniform_levels,
    whole_levels,
)
from calibration.fit.coder import fit_sinks
from calibration.fit.splines import MonotoneSpline, spline_levels
from calibration.fit.transform import Transform, weighted_klt
from calibration.planners.budget import plan_budget
from calibration.statistics import FISHER_FLOOR, KindStatistics, Statistics
from vllm_kvsplice.artifact import pack_levels
from vllm_kvsplice.codec import LEVELS
from vllm_kvsplice.layout import GROUP, MAX_WIDTH

# Least mean squared error of a unit Gaussian in 2**b levels (Max, Quantizing for Minimum Distortion, 1960, table I);
# past that table its limit for many levels (Panter & Dite, 1951).
GAUSSIAN_OPTIMUM = {0: 1.0, 1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
GAUSSIAN_OPTIMUM |= {width: 3**0.5 * torch.pi / 2 / 4**width for width in (6, 7, 8)}
GAUSSIAN_LEVELS = {1: [0.7979], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
# Histograms of 1/100 of a standard deviation, out to 12 on either side.
BINS, PER_UNIT, REACH = 2400, 100, 12.0
CENTRES = (torch.arange(BINS, dtype=torch.float64) + 0.5) / PER_UNIT - REACH


def kind_statistics(seed: int = 0, shape: tuple[int, ...] = (2, 3, 16), samples: int = 500) -> KindStatistics:
    """Correlated residuals and gradients of very unequal directions, for L layers, H heads, D dimensions."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads, dim = shape

    def correlated(count: int) -> Tensor:
        mixing = torch.randn(layers, heads, dim, dim, generator=generator) * 0.85 ** torch.arange(dim)
        return torch.randn(layers, heads, count, dim, generator=generator) @ mixing

    residual, gradient = correlated(samples), correlated(samples)
    mean = torch.randn(*shape, generator=generator)
    return KindStatistics(
        mean=mean,
        fisher=gradient.mT @ gradient / samples,
        residual=(residual - residual.mean(2, keepdim=True)).half(),
        weight=torch.ones(layers, heads, samples),
        sink=mean[:, :, None] + residual[:, :, :64],
    )


def codebooks(statistics: KindStatistics, transform: Transform) -> Codebooks:
    levels = rounded(lloyd_max)
    return fit_codebooks(statistics.residual, statistics.weight, transform.analysis, transform.importance, levels)


def cost(statistics: KindStatistics, error: Tensor) -> Tensor:
    """Mean of e^T M e for errors [L, H, n, D], M the Fisher matrix with the floor that keeps every direction dear."""
    dim = error.shape[-1]
    floor = FISHER_FLOOR * statistics.fisher.diagonal(dim1=-2, dim2=-1).sum(-1) / dim
    metric = statistics.fisher.double() + floor.double()[..., None, None] * torch.eye(dim)
    return torch.einsum("lhnd,lhde,lhne->lhn", error.double(), metric, error.double()).mean(-1)


class TestTransform:
    @pytest.fixture(scope="class")
    def fitted(self) -> tuple[KindStatistics, Transform]:
        statistics = kind_statistics()
        return statistics, weighted_klt(statistics)

    def test_synthesis_undoes_analysis(self, fitted):
        _, transform = fitted
        product = transform.analysis.double() @ transform.synthesis.double()
        torch.testing.assert_close(product, torch.eye(16).double().expand_as(product), atol=1e-4, rtol=0)

    def test_latents_are_uncorrelated_with_unit_variance(self, fitted):
        statistics, transform = fitted
        latents = torch.einsum("lhrd,lhnd->lhrn", transform.analysis.double(), statistics.residual.double())
        covariance = latents @ latents.mT / latents.shape[-1]
        # The least of directions has 1e-5 of the variance of the largest, hence the float32 analysis 2e-2 of error.
        torch.testing.assert_close(covariance, torch.eye(16).double().expand_as(covariance), atol=2e-2, rtol=0)

    def test_latents_come_in_order_of_importance(self, fitted):
        _, transform = fitted
        assert (transform.importance > 0).all()
        assert (transform.importance.diff(dim=-1) <= 0).all()

    def test_errors_of_latents_cost_their_importance(self, fitted):
        statistics, transform = fitted
        latent_error = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(1)).double()
        error = torch.einsum("lhdr,lhnr->lhnd", transform.synthesis.double(), latent_error)
        expected = (latent_error.square() * transform.importance.double()[:, :, None]).sum(-1).mean(-1)
        torch.testing.assert_close(cost(statistics, error), expected, rtol=1e-4, atol=0)

    def test_dropping_all_latents_costs_all_their_importance(self, fitted):
        statistics, transform = fitted
        torch.testing.assert_close(
            cost(statistics, statistics.residual), transform.importance.sum(-1).double(), rtol=1e-4, atol=0
        )

    def test_no_other_basis_loses_less_when_half_of_it_is_dropped(self, fitted):
        statistics, transform = fitted
        kept = transform.synthesis[..., :8] @ transform.analysis[..., :8, :]
        lost = statistics.residual.float() @ (torch.eye(16) - kept).mT
        for seed in range(5):
            basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))).Q[:, :8]
            other = statistics.residual.float() @ (torch.eye(16) - basis @ basis.T)
            assert (cost(statistics, lost) <= cost(statistics, other)).all()

    @pytest.mark.parametrize("case", ["no gradient", "no variance", "one direction", "few samples"])
    def test_degenerate_statistics_give_a_usable_transform(self, case):
        statistics = kind_statistics(samples=5 if case == "few samples" else 500)
        if case == "no gradient":
            statistics.fisher[1, 2] = 0
        if case == "no variance":
            statistics.residual[1, 2] = 0
        if case == "one direction":
            statistics.residual[1, 2] = statistics.residual[1, 2, :, :1]
        transform = weighted_klt(statistics)
        assert all(tensor.isfinite().all() for tensor in vars(transform).values())
        product = transform.analysis.double() @ transform.synthesis.double()
        torch.testing.assert_close(product, torch.eye(16).double().expand_as(product), atol=0.05, rtol=0)
        levels = codebooks(statistics, transform)
        assert levels.distortion.isfinite().all()


QUANTILES = torch.distributions.Normal(0, 1).icdf(torch.arange(0.5, 1e6, dtype=torch.float64) / 1e6)


def gaussian() -> Tensor:
    return torch.exp(-CENTRES.square() / 2)[None] / PER_UNIT / (2 * torch.pi) ** 0.5


def histogram_of(samples: Tensor) -> Tensor:
    return torch.histc(samples.float(), BINS, -REACH, REACH).double()[None] / len(samples)


def textbook_lloyd(histogram: Tensor, width: int) -> float:
    """Lloyd's algorithm over bins, one at a time, started from evenly spaced levels and run until it stands still."""
    weight = histogram[0]
    used = CENTRES[weight > 0]
    levels = torch.linspace(float(used.min()), float(used.max()), (1 << width) + 2, dtype=torch.float64)[1:-1]
    before = torch.zeros_like(levels)
    while (levels - before).abs().max() > 1e-4:
        before = levels.clone()
        nearest = (CENTRES[:, None] - levels).abs().argmin(1)
        for i in range(len(levels)):
            cell = nearest == i
            if weight[cell].sum() > 0:
                levels[i] = (weight * CENTRES)[cell].sum() / weight[cell].sum()
    return distortion_of(histogram, levels)


def distortion_of(histogram: Tensor, levels: Tensor) -> float:
    """Squared error of coding every bin by its nearest level, the definition."""
    return float((histogram[0] * (CENTRES[:, None] - levels.double()).abs().min(1).values.square()).sum())


def stated(histogram: Tensor, levels: Tensor) -> float:
    """The same as codebooks reckon it."""
    return float(squared_error(levels.double(), moments_of(histogram)))


SAMPLES = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
SHAPES = {
    "gaussian": gaussian(),
    "laplacian": histogram_of(torch.distributions.Laplace(0, 0.7).icdf(torch.arange(0.5, 20_000) / 20_000)),
    "two peaks": histogram_of(SAMPLES * 0.2 + SAMPLES.sign()),
    "one-sided": histogram_of(SAMPLES.square() - 1),
    "clipped": histogram_of(SAMPLES.clamp(-1, 1)),
}
DEGENERATE = {
    "empty": torch.zeros(1, BINS, dtype=torch.float64),
    "one bin": histogram_of(torch.full((10,), 0.105)),
    "two bins": histogram_of(torch.tensor([-11.995, 11.995])),
    "last bin": histogram_of(torch.full((10,), 11.999)),
    "first bin": histogram_of(torch.full((10,), -11.999)),
    "an outlier": histogram_of(torch.cat((SAMPLES * 0.01, torch.tensor([11.0])))),
}


class TestLloydMax:
    @pytest.mark.parametrize("width", GAUSSIAN_OPTIMUM)
    def test_distortion_of_a_gaussian_is_the_published_optimum(self, width):
        levels = lloyd_max(gaussian(), width)[0].double()
        left = (QUANTILES - levels[torch.searchsorted((levels[1:] + levels[:-1]) / 2, QUANTILES)]).square().mean()
        # Boundaries on a grid of 1/100 cost 1 % at 4 bits and 3 % at 8, where cells are two bins wide.
        assert float(left) == pytest.approx(GAUSSIAN_OPTIMUM[width], rel=0.002 if width <= 3 else 0.03)

    @pytest.mark.parametrize("width", GAUSSIAN_LEVELS)
    def test_levels_of_a_gaussian_are_the_published_ones(self, width):
        positive = GAUSSIAN_LEVELS[width]
        expected = torch.tensor([-x for x in reversed(positive)] + positive)
        # Three bins: the optimum is so flat that a boundary on the grid can stop short of it.
        torch.testing.assert_close(lloyd_max(gaussian(), width)[0], expected, atol=3 / PER_UNIT, rtol=0)

    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_as_good_as_a_textbook_lloyd(self, shape, width):
        assert stated(SHAPES[shape], lloyd_max(SHAPES[shape], width)) <= textbook_lloyd(SHAPES[shape], width) * 1.03

    @pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
    @pytest.mark.parametrize("shape", SHAPES | DEGENERATE)
    def test_levels_ascend_and_the_stated_distortion_is_true(self, shape, width):
        histogram = (SHAPES | DEGENERATE)[shape]
        levels = lloyd_max(histogram, width)
        left = stated(histogram, levels)
        assert levels.shape == (1, 1 << width)
        assert levels.dtype == torch.float32
        assert (levels.diff() > 0).all()
        # Boundaries fall on bin edges, so a bin may be coded by its second nearest level: at most half a bin off.
        exact = distortion_of(histogram, levels[0])
        assert float(left) == pytest.approx(exact, rel=0.02, abs=float(histogram.sum()) / PER_UNIT**2 / 4)

    @pytest.mark.parametrize("shape", SHAPES | DEGENERATE)
    def test_distortion_falls_with_the_width(self, shape):
        histogram = (SHAPES | DEGENERATE)[shape]
        left = [stated(histogram, lloyd_max(histogram, width)) for width in range(MAX_WIDTH + 1)]
        within_a_bin = float(histogram.sum()) / PER_UNIT**2
        assert all(more <= less + within_a_bin for less, more in pairwise(left))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(-30, 30), min_size=1, max_size=40), st.integers(0, MAX_WIDTH))
    def test_any_histogram_gives_ascending_levels(self, values, width):
        histogram = histogram_of(torch.tensor(values).clamp(-11.99, 11.99))
        levels = lloyd_max(histogram, width)
        assert (levels.diff() > 0).all()
        assert 0 <= stated(histogram, levels) < torch.inf

    def test_histograms_do_not_influence_each_other(self):
        together = lloyd_max(torch.cat(list(SHAPES.values())), 3)
        for row, histogram in enumerate(SHAPES.values()):
            torch.testing.assert_close(together[row : row + 1], lloyd_max(histogram, 3))


class TestSplines:
    @pytest.fixture
    def spline(self) -> MonotoneSpline:
        generator = torch.Generator().manual_seed(0)
        steps = torch.rand(2, 5, 7, generator=generator, dtype=torch.float64) + 0.05
        return MonotoneSpline(steps[0].cumsum(1), steps[1].cumsum(1), steps[0] + 0.1)

    def test_passes_through_its_knots_with_its_slopes(self, spline):
        torch.testing.assert_close(spline(spline.x), spline.y)
        x = spline.x.clone().requires_grad_()
        spline(x).sum().backward()
        torch.testing.assert_close(x.grad, spline.slope)

    def test_inverse_is_exact_and_both_rise(self, spline):
        share = torch.linspace(0, 1, 201, dtype=torch.float64)
        x = spline.x[:, :1] + share * (spline.x[:, -1:] - spline.x[:, :1])
        y = spline(x)
        assert (y.diff() > 0).all()
        torch.testing.assert_close(spline.inverse(y), x, rtol=0, atol=1e-12)

    def test_straight_where_knots_and_slopes_are(self):
        knots = torch.arange(5.0)[None]
        spline = MonotoneSpline(knots, 3 * knots, torch.full((1, 5), 3.0))
        x = torch.tensor([[0.1, 1.7, 3.9]])
        torch.testing.assert_close(spline(x), 3 * x)

    @pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("shape", ["gaussian", "laplacian", "one-sided", "clipped"])
    def test_levels_come_close_to_lloyd_and_max(self, shape, width):
        best = stated(SHAPES[shape], lloyd_max(SHAPES[shape], width))
        assert stated(SHAPES[shape], spline_levels(SHAPES[shape], width)) <= 1.15 * best

    @pytest.mark.parametrize("width", [1, 4, 8])
    @pytest.mark.parametrize("shape", SHAPES | DEGENERATE)
    def test_levels_ascend(self, shape, width):
        levels = spline_levels((SHAPES | DEGENERATE)[shape], width)
        assert levels.shape == (1, 1 << width)
        assert (levels.diff() > 0).all()


class TestUniformLevels:
    @pytest.mark.parametrize("width", range(1, MAX_WIDTH + 1))
    @pytest.mark.parametrize("shape", SHAPES | DEGENERATE)
    def test_levels_are_evenly_spaced_whole_numbers(self, shape, width):
        levels, unit = uniform_levels((SHAPES | DEGENERATE)[shape], width)
        steps = levels.diff()
        assert levels.shape == (1, 1 << width)
        assert (steps == steps[:, :1]).all()
        assert float(steps[0, 0]) >= 1
        assert torch.equal(levels, levels.round())
        assert levels.min() >= -128
        assert levels.max() <= 127
        assert (unit > 0).all()

    # By Max, 1960, table II: the least squared error of evenly spaced levels for a Gaussian.
    @pytest.mark.parametrize(
        ("width", "optimum"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154), (5, 0.003495)]
    )
    def test_the_error_for_a_gaussian_is_the_published_optimum(self, width, optimum):
        levels, unit = uniform_levels(gaussian(), width)
        assert float(stated(gaussian(), levels * unit)) == pytest.approx(optimum, rel=0.02)

    @pytest.mark.parametrize("width", [1, 2, 3])
    def test_levels_move_to_where_the_latents_are(self, width):
        """No worse than any symmetric levels, by much where latents lie to one side."""
        histogram = SHAPES["one-sided"]
        levels, unit = uniform_levels(histogram, width)
        code = torch.arange(1 << width) - (2**width - 1) / 2
        symmetric = min(float(stated(histogram, code[None] * step / 50)) for step in range(2, 200))
        assert float(stated(histogram, levels * unit)) < 0.8 * symmetric


class TestWholeLevels:
    @pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
    @pytest.mark.parametrize("shape", SHAPES | DEGENERATE)
    def test_levels_are_whole_numbers_that_ascend_and_their_error_is_stated_truly(self, shape, width):
        histogram = (SHAPES | DEGENERATE)[shape]
        levels, unit = whole_levels(histogram, lloyd_max(histogram, width))
        assert torch.equal(levels, levels.round())
        assert (levels.diff() > 0).all()
        assert levels.min() >= -128
        assert levels.max() <= 127
        assert (unit > 0).all()
        exact = distortion_of(histogram, levels[0].double() * unit)
        assert stated(histogram, levels * unit) == pytest.approx(
            exact, rel=0.02, abs=float(histogram.sum()) / PER_UNIT**2 / 4
        )

    # The last is a uniform quantiser of 256 levels: its optimum for a Gaussian is 1.7 times Lloyd and Max's.
    @pytest.mark.parametrize(("width", "limit"), [(1, 1.001), (2, 1.001), (3, 1.005), (4, 1.01), (5, 1.05), (6, 1.2)])
    def test_whole_numbers_cost_little(self, width, limit):
        levels = lloyd_max(gaussian(), width)
        whole, unit = whole_levels(gaussian(), levels)
        assert stated(gaussian(), whole * unit) <= stated(gaussian(), levels) * limit

    @pytest.mark.parametrize("width", [7, 8])
    def test_many_levels_come_close_to_the_best_uniform_quantiser(self, width):
        levels, unit = whole_levels(gaussian(), lloyd_max(gaussian(), width))
        left = distortion_of(gaussian(), levels[0].double() * unit)
        uniform = min(
            distortion_of(gaussian(), torch.arange(0.5 - 2 ** (width - 1), 2 ** (width - 1)) * step / 1000)
            for step in range(20, 80)
        )
        # Units are judged with boundaries on bins, which at 8 bits are a third of a cell wide.
        assert left <= uniform * (1.05 if width == 7 else 1.2)


def reading_cost(latents: Tensor, read: Tensor, weight: Tensor) -> Tensor:
    """What reading `latents` [.., n] as `read` costs, by definition: errors proportional to the latent count threefold."""
    error = read - latents
    along = (error * latents * weight).sum(-1, keepdim=True) / (latents.square() * weight).sum(-1, keepdim=True)
    shared = along * latents
    return ((error - shared).square() * weight).sum(-1) + 3 * (shared.square() * weight).sum(-1)


class TestReadingBack:
    @pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_no_other_gain_costs_less_and_the_stated_cost_is_true(self, shape, width):
        levels = lloyd_max(SHAPES[shape], width).double()
        nearest = levels[0, (CENTRES[:, None] - levels).abs().argmin(1)]
        gain, left = read_back(SHAPES[shape], levels)
        costs = [
            float(reading_cost(CENTRES, gain * factor * nearest, SHAPES[shape][0]))
            for factor in (1, 0.9, 0.97, 1.03, 1.1)
        ]
        assert costs[0] == min(costs)
        assert float(left) == pytest.approx(costs[0], rel=0.03)

    def test_few_levels_of_a_gaussian_are_read_larger_and_nothing_costs_threefold(self):
        gains = [float(read_back(gaussian(), lloyd_max(gaussian(), width))[0]) for width in range(1, 7)]
        # One bit: E[qz] = E[qq] = 2 / pi, so 3 (2 / pi) / (2 / pi + 2 (2 / pi)^2) by hand.
        assert gains[0] == pytest.approx(3 / (1 + 4 / torch.pi), rel=1e-3)
        assert all(more > less > 1 for more, less in pairwise(gains))
        assert float(read_back(gaussian(), torch.zeros(1, 1))[1]) == pytest.approx(3, rel=1e-3)

    @pytest.mark.parametrize("shape", DEGENERATE)
    def test_degenerate_histograms_have_finite_gains(self, shape):
        for width in (1, 4, 8):
            gain, left = read_back(DEGENERATE[shape], lloyd_max(DEGENERATE[shape], width))
            assert gain.isfinite().all()
            assert left.isfinite().all()
            assert left >= 0


def test_stated_distortion_of_codebooks_is_what_coding_costs(monkeypatch):
    monkeypatch.setattr("calibration.fit.codebooks._UNSEEN", 0.0)
    monkeypatch.setattr("calibration.fit.codebooks._BROADER", 1.0)
    statistics = kind_statistics(samples=3000)
    transform = weighted_klt(statistics)
    books = codebooks(statistics, transform)
    latents = torch.einsum("lhrd,lhnd->lhrn", transform.analysis, statistics.residual.float()).unflatten(2, (-1, GROUP))
    importance = transform.importance.unflatten(2, (-1, GROUP))
    for width in (0, 1, 3, 5):
        levels = (books.levels[width] * books.unit[..., width, None])[:, :, :, None, None]
        nearest = levels.expand(*latents.shape, -1).gather(-1, (latents[..., None] - levels).abs().argmin(-1, True))[
            ..., 0
        ]
        read = books.gain[..., width, None, None] * nearest
        expected = (reading_cost(latents, read, torch.full(latents.shape[-1:], 1 / 3000)) * importance).sum(-1)
        torch.testing.assert_close(books.distortion[..., width], expected, rtol=0.02, atol=0)


class TestSinks:
    @pytest.fixture(scope="class")
    def fitted(self) -> tuple[KindStatistics, Transform]:
        statistics = kind_statistics(samples=3000)
        return statistics, weighted_klt(statistics)

    def with_sink(self, fitted, sink: Tensor) -> tuple[Tensor, Tensor]:
        _, transform = fitted
        return fit_sinks(sink, transform.analysis)

    def test_sink_that_never_varies_is_exact(self, fitted):
        constant = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(5)) * 100
        sink, scale = self.with_sink(fitted, constant[:, :, None].expand(-1, -1, 64, -1))
        torch.testing.assert_close(sink, constant)
        # Of float32 sums of vectors of length 400.
        assert scale.max() < 0.05

    def test_first_tokens_like_all_others_count_in_ordinary_units(self, fitted):
        statistics, _ = fitted
        ordinary = statistics.mean[:, :, None] + statistics.residual.float()
        sink, scale = self.with_sink(fitted, ordinary)
        torch.testing.assert_close(sink, statistics.mean, rtol=0, atol=0.02)
        torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0, atol=0.02)

    def test_each_head_has_its_own_units(self, fitted):
        statistics, _ = fitted
        first_tokens = statistics.mean[:, :, None] + 50 + statistics.residual.float()
        first_tokens[1, 2] = first_tokens[1, 2].mean(0) + (first_tokens[1, 2] - first_tokens[1, 2].mean(0)) / 10
        _, scale = self.with_sink(fitted, first_tokens)
        torch.testing.assert_close(scale[1, 2], scale.new_full((16,), 0.1), rtol=0, atol=0.01)
        assert (scale[0] - 1).abs().max() < 0.02


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return Statistics((0, 2), kind_statistics(0), kind_statistics(1), torch.arange(4, 504), tokens=500)


class TestPca:
    @pytest.mark.parametrize("budget", [32, 64, 192])
    def test_latents_without_bits_have_no_part_in_the_codec(self, statistics, budget):
        fitted = FITS["pca"](statistics)
        codec = fitted.codec(plan_budget(fitted.distortion, budget))
        assert codec.plan.bytes_per_token == budget
        for name, widths in zip(("key", "value"), codec.plan.widths, strict=True):
            on = (widths > 0).repeat_interleave(GROUP, -1)
            assert ((codec.tensors[f"{name}.analysis"] != 0).any(-1) == on).all()
            assert ((codec.tensors[f"{name}.synthesis"] != 0).any(-2) == on).all()
            assert len(codec.tensors[f"{name}.levels"]) == sum(1 << int(w) for w in widths.flatten() if w)

    def test_planned_distortion_is_that_of_the_codebooks_it_exports(self, statistics):
        fitted = FITS["pca"](statistics)
        assert fitted.distortion.shape == (2, 2, 3, 2, MAX_WIDTH + 1)
        codec = fitted.codec(plan_budget(fitted.distortion, 96))
        books = codebooks(statistics.key, weighted_klt(statistics.key))
        torch.testing.assert_close(fitted.distortion[0], books.distortion)
        widths = codec.plan.widths[0]
        assert books.of(widths).shape == (*widths.shape, LEVELS)
        assert torch.equal(codec.tensors["key.levels"], pack_levels(books.of(widths), widths.tolist()))


@pytest.mark.parametrize("stage", ["start", "codec"])
def test_every_head_is_fitted_by_the_algorithm_that_its_plan_names(statistics, stage):
    fits = (("kvsplice", None, "pca"), (None, "kvsplice_spline", "kvsplice"))
    fit = FitByHead(statistics, "pca_spline")
    plan = replace(plan_budget(fit.distortion, 96), fits=fits)
    joined = getattr(fit, stage)(plan)
    named = {"pca_spline", *(name for names in fits for name in names if name)}
    alone = {name: getattr(FITS[name](statistics), stage)(plan) for name in named}
    for layer, names in enumerate(fits):
        for head, name in enumerate(names):
            for kind in ("key", "value"):
                own, wanted = (getattr(codec, kind) for codec in (joined, alone[name or "pca_spline"]))
                for field in ("analysis", "synthesis", "levels", "unit"):
                    assert torch.equal(getattr(own, field)[layer, head], getattr(wanted, field)[layer, head])
    # What the plan names makes a difference.
    assert not torch.equal(alone["pca"].key.levels, alone["pca_spline"].key.levels)
    assert fit.distortion.equal(FITS["pca_spline"](statistics).distortion)


def test_plans_for_gpus_take_no_width_that_they_read_slowly(statistics):
    free, limited = FITS["pca_uniform"](statistics).distortion, FitByHead(statistics, "pca_uniform").distortion
    plan, wide = (plan_budget(distortion, free[..., 0].numel() * 5) for distortion in (limited, free))
    assert wide.widths.max() > 6
    assert plan.widths.max() == 6
    assert plan.widths.sum() == wide.widths.sum()

"""`pca`: the closed-form codec. A Fisher-weighted Karhunen-Loeve transform and Lloyd-Max codebooks in whole numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.plan import Plan
from calibration.statistics import KindStatistics, Statistics
from vllm_kvsplice.artifact import pack_levels
from vllm_kvsplice.codec import HIGHEST_LEVEL, LEVELS, LOWEST_LEVEL
from vllm_kvsplice.layout import GROUP, MAX_WIDTH

# Share of the mean eigenvalue added to every direction of the Fisher matrix, so that no direction is free.
FISHER_FLOOR = 0.05
# Unit-variance latents fall into bins of 1/100 standard deviation, out to 12.
_BINS_PER_UNIT, _REACH = 100, 12.0
_LLOYD_ROUNDS = 40
# From this width on cells are about as narrow as bins: there the closed form is better than what Lloyd's rounds find.
_FINE = 6
# Shares of a codebook's reach that its whole numbers may cover. With many levels a finer unit is worth more than the tails.
_REACHES = tuple(0.95**step for step in range(28))
# Share of each histogram that is spread evenly over all bins: the outliers that the sample happens not to hold.
_UNSEEN = 1e-4


@dataclass(frozen=True)
class FittedCodec:
    """A plan and the tensors that an artifact holds for it (all but the rotary frequencies)."""

    plan: Plan
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Transform:
    """Analysis E and synthesis D = E^-1, [L, H, D, D] each, and the weighted variance of each latent, [L, H, D].

    Latent i has unit variance, and an error of variance v in it costs ``importance[i] * v``.
    """

    analysis: Tensor
    synthesis: Tensor
    importance: Tensor


@dataclass(frozen=True)
class Codebooks:
    """For every group and width b in 0..8.

    Attributes:
        levels: by width, [L, H, G, 2**b], whole numbers.
        unit: what one of them stands for, in standard deviations of the group's latents, [L, H, G, 9].
        distortion: [L, H, G, 9].

    """

    levels: list[Tensor]
    unit: Tensor
    distortion: Tensor

    def unit_of(self, widths: Tensor) -> Tensor:
        """Of each latent under a plan's `widths` [L, H, G]: [L, H, R]."""
        return self.unit.gather(-1, widths[..., None])[..., 0].repeat_interleave(GROUP, -1)

    def of(self, widths: Tensor) -> Tensor:
        """The codebooks [L, H, G, 256] of a plan's `widths` [L, H, G]; past 2**b they repeat the last level."""
        chosen = torch.zeros(*widths.shape, LEVELS)
        for width, levels in enumerate(self.levels):
            padded = torch.cat((levels, levels[..., -1:].expand(*widths.shape, LEVELS - levels.shape[-1])), -1)
            chosen = torch.where((widths == width)[..., None], padded, chosen)
        return chosen


@dataclass(frozen=True)
class PcaFit:
    """Transforms and codebooks for every width, of keys and values: what a plan chooses from."""

    statistics: Statistics
    transforms: dict[str, Transform]
    codebooks: dict[str, Codebooks]

    @classmethod
    def of(cls, statistics: Statistics) -> "PcaFit":
        transforms = {name: weighted_klt(kind) for name, kind in _kinds(statistics).items()}
        codebooks = {name: fit_codebooks(kind, transforms[name]) for name, kind in _kinds(statistics).items()}
        return cls(statistics, transforms, codebooks)

    @property
    def distortion(self) -> Tensor:
        """Fisher-weighted squared error of each group at widths 0..8, [2, L, H, G, 9]."""
        return torch.stack([book.distortion for book in self.codebooks.values()])

    def codec(self, plan: Plan) -> FittedCodec:
        """What an artifact holds under `plan`."""
        tensors: dict[str, Tensor] = {}
        for (name, kind), widths in zip(_kinds(self.statistics).items(), plan.widths, strict=True):
            transform, codebooks = self.transforms[name], self.codebooks[name]
            sink, scale = fit_sinks(kind, transform)
            on = (widths > 0).repeat_interleave(GROUP, -1).float()
            unit = codebooks.unit_of(widths)
            tensors |= {
                f"{name}.mean": kind.mean,
                f"{name}.analysis": transform.analysis * (on / unit)[..., None],
                f"{name}.synthesis": transform.synthesis * (on * unit)[..., None, :],
                f"{name}.levels": pack_levels(codebooks.of(widths), widths.tolist()),
                f"{name}.sink": sink,
                f"{name}.sink_scale": scale,
            }
        return FittedCodec(plan, tensors)


def _kinds(statistics: Statistics) -> dict[str, KindStatistics]:
    return {"key": statistics.key, "value": statistics.value}


def weighted_klt(statistics: KindStatistics) -> Transform:
    """The transform that decorrelates latents in the metric of the Fisher matrix.

    With A the square root of the (regularised) Fisher matrix and A S A = U diag(e) U^T for covariance S, the latents are
    z = diag(e)^-1/2 U^T A u: uncorrelated, of unit variance, and squared errors in them add up to u's Fisher-weighted
    squared error (the KLT is optimal for a weighted square error: Gray & Neuhoff, Quantization, 1998).
    """
    covariance = residual_covariance(statistics.residual)
    eigenvalues, vectors = torch.linalg.eigh(statistics.fisher.double())
    eigenvalues = eigenvalues.clamp_min(0)
    eigenvalues = eigenvalues + FISHER_FLOOR * eigenvalues.mean(-1, keepdim=True).clamp_min(1e-30)
    root = (vectors * eigenvalues.sqrt()[..., None, :]) @ vectors.mT
    inverse = (vectors * eigenvalues.rsqrt()[..., None, :]) @ vectors.mT
    variance, basis = torch.linalg.eigh(root @ covariance @ root)
    variance, basis = variance.flip(-1), basis.flip(-1)
    variance = variance.clamp_min(1e-12 * variance[..., :1].clamp_min(1e-30))
    deviation = variance.sqrt()
    analysis = (basis.mT @ root) / deviation[..., None]
    synthesis = (inverse @ basis) * deviation[..., None, :]
    return Transform(analysis.float(), synthesis.float(), variance.float())


def residual_covariance(residual: Tensor) -> Tensor:
    """[L, H, D, D] in float64, one layer at a time; `residual` has its mean removed already."""
    return torch.stack([(x.float().mT @ x.float() / x.shape[1]).double() for x in residual])


def fit_codebooks(statistics: KindStatistics, transform: Transform) -> Codebooks:
    """Lloyd-Max codebooks (Lloyd, 1982) of every group at every width, on a weighted histogram of its latents.

    Their levels are whole numbers, so that an engine may add up products of codes in integers.
    """
    histogram = torch.stack(
        [
            _histogram(torch.einsum("hrd,hnd->hrn", analysis, residual.float()), importance)
            for analysis, residual, importance in zip(
                transform.analysis, statistics.residual, transform.importance, strict=True
            )
        ]
    )
    shape, flat = histogram.shape[:-1], histogram.flatten(0, -2)
    levels, units, distortion = [], [], []
    for width in range(MAX_WIDTH + 1):
        fitted, unit, left = whole_levels(flat, lloyd_max(flat, width)[0])
        levels.append(fitted.view(*shape, -1))
        units.append(unit.view(shape))
        distortion.append(left.view(shape))
    return Codebooks(levels, torch.stack(units, -1), torch.stack(distortion, -1).float())


def fit_sinks(statistics: KindStatistics, transform: Transform) -> tuple[Tensor, Tensor]:
    """What stands at position 0, [L, H, D], and the standard deviation of each latent around it, [L, H, R].

    The attention sink of most layers hardly depends on the first token, and much attention falls on it: in units of its own
    deviation it is coded far more finely than an ordinary token.
    """
    sink = statistics.sink.mean(2)
    latents = torch.einsum("lhrd,lhsd->lhrs", transform.analysis, statistics.sink - sink[:, :, None])
    return sink, latents.square().mean(-1).sqrt()


def _histogram(latents: Tensor, importance: Tensor) -> Tensor:
    """Weighted share of each bin, float64 [H, G, bins], from latents [H, R, n] and their importance [H, R]."""
    heads, count, samples = latents.shape
    bins = int(2 * _REACH * _BINS_PER_UNIT)
    index = ((latents + _REACH) * _BINS_PER_UNIT).clamp_(0, bins - 1).long()
    index += torch.arange(heads * count).view(heads, count, 1) * bins
    counts = torch.bincount(index.flatten(), minlength=heads * count * bins).view(heads, count, bins).double()
    counts = counts / samples * (1 - _UNSEEN) + _UNSEEN / bins
    weighted = counts * importance.double()[..., None]
    return weighted.unflatten(1, (-1, GROUP)).sum(2)


def lloyd_max(histogram: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Levels [M, 2**width], ascending, and the weighted squared error they leave [M], for M histograms [M, bins]."""
    moments = _moments(histogram)
    levels = _companded_levels(histogram, width)
    if not width:
        levels = torch.zeros_like(levels)
    elif width < _FINE:
        for _ in range(_LLOYD_ROUNDS):
            weight, first, _ = _cells(levels, moments)
            levels = _separated(torch.where(weight > 0, first / weight.clamp_min(1e-300), levels))
    return levels.float(), _squared_error(levels, moments)


def whole_levels(histogram: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`levels` [M, K] of M histograms as whole numbers of a unit: those numbers, the units [M], and the error left [M]."""
    count, moments = levels.shape[1], _moments(histogram)
    rank = torch.arange(count, dtype=torch.float64)
    # The least and the largest number that leave room for the levels before and after.
    lowest, highest = LOWEST_LEVEL + rank, HIGHEST_LEVEL - (count - 1 - rank)
    widest = levels.double().abs().amax(1, keepdim=True).clamp_min(1 / _BINS_PER_UNIT) / HIGHEST_LEVEL
    found = []
    for share in _REACHES if count >= 1 << _FINE else _REACHES[:1]:
        unit = widest * share
        whole = (levels.double() / unit).round().maximum(lowest)
        whole = ((whole - rank).cummax(1).values + rank).minimum(highest)
        found.append((_squared_error(whole * unit, moments), unit[:, 0], whole))
    error, units, wholes = (torch.stack(candidates) for candidates in zip(*found, strict=True))
    best = error.argmin(0)
    row = torch.arange(len(levels))
    return wholes[best, row].float(), units[best, row].float(), error[best, row]


def _moments(histogram: Tensor) -> list[Tensor]:
    centre = (torch.arange(histogram.shape[1], dtype=torch.float64) + 0.5) / _BINS_PER_UNIT - _REACH
    return [_cumulative(histogram * centre**power) for power in (0, 1, 2)]


def _squared_error(levels: Tensor, moments: list[Tensor]) -> Tensor:
    """What coding by the nearest of `levels` [M, K] costs, [M]."""
    weight, first, second = _cells(levels, moments)
    return (second - 2 * levels * first + levels**2 * weight).sum(-1).clamp_min(0)


def _cumulative(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


def _cells(levels: Tensor, moments: list[Tensor]) -> list[Tensor]:
    """Moments of the histogram inside each level's cell, [M, K] each."""
    edges = (levels[:, 1:] + levels[:, :-1]) / 2
    last = moments[0].shape[1] - 1
    index = ((edges + _REACH) * _BINS_PER_UNIT).round().long().clamp(0, last)
    index = torch.nn.functional.pad(index, (1, 0))
    index = torch.nn.functional.pad(index, (0, 1), value=last)
    return [m.gather(1, index).diff(dim=1) for m in moments]


def _companded_levels(histogram: Tensor, width: int) -> Tensor:
    """Levels at the quantiles of the density's cube root: the optimum for many levels (Panter & Dite, 1951)."""
    kernel = torch.ones(1, 1, 21, dtype=torch.float64) / 21
    smooth = torch.nn.functional.conv1d(histogram[:, None], kernel, padding=10)[:, 0]
    density = _cumulative(smooth.clamp_min(0) ** (1 / 3))
    density = density / density[:, -1:].clamp_min(1e-300)
    count = 1 << width
    wanted = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).expand(len(histogram), -1).contiguous()
    above = torch.searchsorted(density, wanted).clamp(1, histogram.shape[1])
    low, high = density.gather(1, above - 1), density.gather(1, above)
    inside = ((wanted - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    return _separated((above - 1 + inside) / _BINS_PER_UNIT - _REACH)


def _separated(levels: Tensor) -> Tensor:
    """The same levels, strictly ascending: empty cells may have let two coincide."""
    ramp = torch.arange(levels.shape[1], dtype=levels.dtype) * 1e-4
    return (levels - ramp).cummax(1).values + ramp

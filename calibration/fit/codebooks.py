"""Codebooks in whole numbers: Lloyd-Max levels of every group of latents at every width."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvsplice.codec import HIGHEST_LEVEL, LEVELS, LOWEST_LEVEL
from vllm_kvsplice.layout import GROUP, MAX_WIDTH

# (weighted histograms [M, bins], width) -> levels [M, 2**width], whole numbers, ascending, and what one of them stands for
# in standard deviations, [M].
LevelFit = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# Unit-variance latents fall into bins of 1/100 standard deviation, out to 12.
_BINS_PER_UNIT, _REACH = 100, 12.0
_LLOYD_ROUNDS = 40
# From this width on cells are about as narrow as bins: there the closed form is better than what Lloyd's rounds find.
_FINE = 6
# Shares of a codebook's reach that its whole numbers may cover. With many levels a finer unit is worth more than the tails.
_REACHES = tuple(0.95**step for step in range(28))
# Steps of evenly spaced levels, as shares of those that reach as far as the histogram does.
_STEPS = tuple(0.97**step for step in range(120))
# Of 256 whole numbers, those that evenly spaced levels span; the places for an offset in a step; rounds of the search.
_SPAN, _PLACES, _ROUNDS = 192, 8, 3
# Share of each histogram that is spread evenly over all bins: the outliers that the sample happens not to hold.
_UNSEEN = 1e-4
# Latents of other text, and of a model that reads through the codec, are wider than those measured (DECISIONS.md).
_BROADER = 1.15
# What the part of an error costs that is proportional to the latent, beside what any error costs: tokens share it, so it
# does not average out where attention adds them up (docs/codec.md).
SHARED = 2.0


@dataclass(frozen=True)
class Codebooks:
    """For every group and width b in 0..8.

    Attributes:
        levels: by width, [L, H, G, 2**b], whole numbers.
        unit: what one of them stands for, in standard deviations of the group's latents, [L, H, G, 9].
        gain: what latents read are multiplied by, because the nearest level is too small on average, [L, H, G, 9].
        distortion: [L, H, G, 9].

    """

    levels: list[Tensor]
    unit: Tensor
    gain: Tensor
    distortion: Tensor

    def unit_of(self, widths: Tensor) -> Tensor:
        """Of each latent under a plan's `widths` [L, H, G]: [L, H, R]."""
        return _of_latents(self.unit, widths)

    def gain_of(self, widths: Tensor) -> Tensor:
        """Of each latent under a plan's `widths` [L, H, G]: [L, H, R]."""
        return _of_latents(self.gain, widths)

    def of(self, widths: Tensor) -> Tensor:
        """The codebooks [L, H, G, 256] of a plan's `widths` [L, H, G]; past 2**b they repeat the last level."""
        chosen = torch.zeros(*widths.shape, LEVELS)
        for width, levels in enumerate(self.levels):
            padded = torch.cat((levels, levels[..., -1:].expand(*widths.shape, LEVELS - levels.shape[-1])), -1)
            chosen = torch.where((widths == width)[..., None], padded, chosen)
        return chosen


def _of_latents(by_width: Tensor, widths: Tensor) -> Tensor:
    """Of `by_width` [L, H, G, 9] what `widths` [L, H, G] choose, for each latent: [L, H, R]."""
    return by_width.gather(-1, widths[..., None])[..., 0].repeat_interleave(GROUP, -1)


def fit_codebooks(
    residual: Tensor, weight: Tensor, analysis: Tensor, importance: Tensor, level_fit: LevelFit
) -> Codebooks:
    """Codebooks of every group at every width, on a weighted histogram of its latents.

    Their levels are whole numbers, so that an engine may add up products of codes in integers.

    Args:
        residual: samples [L, H, n, D].
        weight: of each of them, [L, H, n].
        analysis: to latents of about unit variance, [L, H, R, D].
        importance: of an error in each latent, [L, H, R].
        level_fit: from histograms to levels.

    """
    histogram = torch.stack(
        [
            _histogram(torch.einsum("hrd,hnd->hrn", rows, x.float()), tokens, latents)
            for rows, x, tokens, latents in zip(analysis, residual, weight, importance, strict=True)
        ]
    )
    shape, flat = histogram.shape[:-1], histogram.flatten(0, -2)
    levels, units, gains, distortion = [], [], [], []
    for width in range(MAX_WIDTH + 1):
        # Without bits a latent is its mean.
        fitted, unit = level_fit(flat, width) if width else (torch.zeros(len(flat), 1), torch.ones(len(flat)))
        gain, left = read_back(flat, fitted * unit[:, None])
        levels.append(fitted.view(*shape, -1))
        units.append(unit.view(shape))
        gains.append(gain.view(shape))
        distortion.append(left.view(shape))
    return Codebooks(levels, *(torch.stack(tensors, -1).float() for tensors in (units, gains, distortion)))


def _histogram(latents: Tensor, weight: Tensor, importance: Tensor) -> Tensor:
    """Weighted share of each bin, float64 [H, G, bins], from latents [H, R, n], weights [H, n] and importance [H, R]."""
    heads, count, samples = latents.shape
    bins = int(2 * _REACH * _BINS_PER_UNIT)
    index = ((latents * _BROADER + _REACH) * _BINS_PER_UNIT).clamp_(0, bins - 1).long()
    index += torch.arange(heads * count).view(heads, count, 1) * bins
    each = weight[:, None].expand_as(latents).flatten().double()
    counts = torch.bincount(index.flatten(), each, minlength=heads * count * bins).view(heads, count, bins)
    counts = counts / samples * (1 - _UNSEEN) + _UNSEEN / bins
    weighted = counts * importance.double()[..., None]
    return weighted.unflatten(1, (-1, GROUP)).sum(2)


def lloyd_max(histogram: Tensor, width: int) -> Tensor:
    """Levels [M, 2**width] that leave the least squared error (Lloyd, 1982), for M histograms [M, bins]."""
    moments = moments_of(histogram)
    levels = companded_levels(histogram, 1 << width)
    if width < _FINE:
        for _ in range(_LLOYD_ROUNDS):
            weight, first, _ = _cells(levels, moments)
            levels = _separated(torch.where(weight > 0, first / weight.clamp_min(1e-300), levels))
    return levels.float()


def whole_levels(histogram: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`levels` [M, K] of M histograms as whole numbers of a unit: those numbers, and the units [M]."""
    count, moments = levels.shape[1], moments_of(histogram)
    rank = torch.arange(count, dtype=torch.float64)
    # The least and the largest number that leave room for the levels before and after.
    lowest, highest = LOWEST_LEVEL + rank, HIGHEST_LEVEL - (count - 1 - rank)
    widest = levels.double().abs().amax(1, keepdim=True).clamp_min(1 / _BINS_PER_UNIT) / HIGHEST_LEVEL
    found = []
    for share in _REACHES if count >= 1 << _FINE else _REACHES[:1]:
        unit = widest * share
        whole = (levels.double() / unit).round().maximum(lowest)
        whole = ((whole - rank).cummax(1).values + rank).minimum(highest)
        found.append((squared_error(whole * unit, moments), unit[:, 0], whole))
    error, units, wholes = (torch.stack(candidates) for candidates in zip(*found, strict=True))
    best = error.argmin(0)
    row = torch.arange(len(levels))
    return wholes[best, row].float(), units[best, row].float()


def rounded(levels_of: Callable[[Tensor, int], Tensor]) -> LevelFit:
    """`levels_of` (histograms, width), levels in standard deviations, as whole numbers."""
    return lambda histogram, width: whole_levels(histogram, levels_of(histogram, width))


def uniform_levels(histogram: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced levels that leave little squared error, a `LevelFit`: unit and offset are searched in turn.

    The step is a whole number of units that leaves room to move all levels; at seven and eight bits it is one.
    """
    count, moments = 1 << width, moments_of(histogram)
    step = max(1, _SPAN // count)
    code = step * torch.arange(count, dtype=torch.float64)
    reach = float(code[-1]) / 2
    units = torch.tensor(_STEPS, dtype=torch.float64) * _REACH / reach
    highest = HIGHEST_LEVEL - int(code[-1])
    offsets = torch.arange(LOWEST_LEVEL, highest + 1, max(1, step // _PLACES), dtype=torch.float64)

    offset = offsets[(offsets + reach).abs().argmin()].expand(len(histogram))
    for _ in range(_ROUNDS):
        levels = code + offset[:, None]
        unit = units[torch.stack([squared_error(levels * u, moments) for u in units]).argmin(0)]
        errors = [squared_error((code + o) * unit[:, None], moments) for o in offsets]
        offset = offsets[torch.stack(errors).argmin(0)]
    return (code + offset[:, None]).float(), unit.float()


def read_back(histogram: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The gain of `levels` [M, K] that costs least on M histograms, and what is left, [M] each.

    With q the nearest level of a latent z and g the gain, an error g q - z has a part (s - 1) z, where s = g E[qz] / E[zz]:
    Lloyd's levels shrink (s < 1). The cost is E[(g q - z)^2] + SHARED (s - 1)^2 E[zz].
    """
    weight, first, second = _cells(levels.double(), moments_of(histogram))
    energy = second.sum(-1).clamp_min(1e-300)
    along, own = (levels * first).sum(-1) / energy, (levels**2 * weight).sum(-1) / energy
    curvature = (own + SHARED * along**2).clamp_min(1e-300)
    gain = (1 + SHARED) * along / curvature
    left = (1 + SHARED) * (1 - gain * along).clamp_min(0)
    return gain, left * energy


def moments_of(histogram: Tensor) -> list[Tensor]:
    """Of order 0, 1 and 2, summed up from the left: [M, bins + 1] each, from [M, bins]."""
    centre = (torch.arange(histogram.shape[1], dtype=torch.float64) + 0.5) / _BINS_PER_UNIT - _REACH
    return [_cumulative(histogram * centre**power) for power in (0, 1, 2)]


def squared_error(levels: Tensor, moments: list[Tensor]) -> Tensor:
    """What coding M histograms of `moments_of` by the nearest of `levels` [M, K], ascending, costs: [M], differentiable."""
    weight, first, second = _cells(levels.detach(), moments)
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


def companded_levels(histogram: Tensor, count: int) -> Tensor:
    """`count` levels at the quantiles of the density's cube root: the optimum for many levels (Panter & Dite, 1951)."""
    kernel = torch.ones(1, 1, 21, dtype=torch.float64) / 21
    smooth = torch.nn.functional.conv1d(histogram[:, None], kernel, padding=10)[:, 0]
    density = _cumulative(smooth.clamp_min(0) ** (1 / 3))
    density = density / density[:, -1:].clamp_min(1e-300)
    wanted = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).expand(len(histogram), -1).contiguous()
    above = torch.searchsorted(density, wanted).clamp(1, histogram.shape[1])
    low, high = density.gather(1, above - 1), density.gather(1, above)
    inside = ((wanted - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    return _separated((above - 1 + inside) / _BINS_PER_UNIT - _REACH)


def _separated(levels: Tensor) -> Tensor:
    """The same levels, strictly ascending: empty cells may have let two coincide."""
    ramp = torch.arange(levels.shape[1], dtype=levels.dtype) * 1e-4
    return (levels - ramp).cummax(1).values + ramp

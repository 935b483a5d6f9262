"""The other order: values are warped, each dimension by a spline of its own, then transformed and coded, and warped back.

A server cannot do this without rebuilding every value, because a sum of warped values is not a warped sum. The cache for
transformers, which rebuilds them anyway, can: ``KVSpliceCache(first.artifact, config, value_warps=first.warps)``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibration.compare.methods import KVSplice
from calibration.fit import FITS
from calibration.fit.splines import MonotoneSpline
from calibration.planners.budget import plan_budget
from calibration.statistics import KindStatistics
from calibration.study import Study
from vllm_kvsplice.artifact import Artifact

# Probabilities at the knots, and samples that they are estimated from.
_KNOTS, _SAMPLES = torch.linspace(-3, 3, 17), 4096
# Beyond the outer knots a warp goes on straight for so many standard deviations.
_TAIL = 12.0
# Least distance of knots, in standard deviations; of a Gaussian they are 0.375 apart.
_APART = 0.03


@dataclass(frozen=True)
class Warp:
    """One spline for each of H heads and D dimensions, which makes values Gaussian and keeps their mean and deviation."""

    spline: MonotoneSpline
    heads: int

    def __call__(self, value: Tensor) -> Tensor:
        """Warped values [H, T, D]."""
        spline = self.spline.to(value.device)
        return self._each(spline, value, spline.x)

    def inverse(self, warped: Tensor) -> Tensor:
        spline = self.spline.to(warped.device)
        return self._each(spline.inverse, warped, spline.y)

    def _each(self, function: Callable[[Tensor], Tensor], value: Tensor, knots: Tensor) -> Tensor:
        rows = value.mT.flatten(0, 1).double()
        inside = rows.maximum(knots[:, :1]).minimum(knots[:, -1:])
        return function(inside).view(self.heads, -1, value.shape[1]).mT.to(value.dtype)


def fit_warp(values: Tensor) -> Warp:
    """From samples [H, n, D]."""
    heads = len(values)
    rows = values.mT.flatten(0, 1).double()
    mean, deviation = rows.mean(1, keepdim=True), rows.std(1, keepdim=True).clamp_min(1e-6)
    share = torch.special.ndtr(_KNOTS).double()
    # Where many samples are alike, knots stay apart: steep pieces would stretch all that lies beyond them.
    ramp = torch.arange(len(_KNOTS)) * _APART * deviation
    x = (torch.quantile(rows, share, dim=1).T - ramp).cummax(1).values + ramp
    y = mean + deviation * _KNOTS
    secant = y.diff(dim=1) / x.diff(dim=1)
    slope = torch.cat((secant[:, :1], (secant[:, 1:] + secant[:, :-1]) / 2, secant[:, -1:]), 1)
    tail = _TAIL * deviation
    x = torch.cat((x[:, :1] - tail, x, x[:, -1:] + tail), 1)
    y = torch.cat((y[:, :1] - tail * slope[:, :1], y, y[:, -1:] + tail * slope[:, -1:]), 1)
    return Warp(MonotoneSpline(x, y, torch.cat((slope[:, :1], slope, slope[:, -1:]), 1)), heads)


@dataclass(frozen=True)
class SplineFirst(KVSplice):
    """Ours with values warped before they are coded, by layer."""

    artifact: Artifact
    warps: Mapping[int, Warp]

    def restore(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        warp = self.warps[layer]
        keys, warped = super().restore(layer, key, warp(value), positions)
        return keys, warp.inverse(warped)


def spline_first(measured: Study, bits: float) -> SplineFirst:
    """`pca` fitted to warped values, planned at `bits` per element."""
    raw = [_raw(measured.statistics.value, row)[:, :_SAMPLES] for row in range(len(measured.layers))]
    warps = [fit_warp(values) for values in raw]
    statistics = replace(measured.statistics, value=_warped(measured.statistics.value, warps))
    fit = FITS["pca"](statistics)
    artifact = measured.artifact_of(fit.codec(plan_budget(fit.distortion, measured.budget_for(bits))))
    name = "KVSplice, spline first"
    by_layer = dict(zip(measured.layers, warps, strict=True))
    codecs = artifact.codecs_on(measured.model.device)
    return SplineFirst(f"{name} {bits:g} bits", name, codecs, artifact, by_layer)


def _raw(kind: KindStatistics, row: int) -> Tensor:
    """Sampled values of a layer, [H, n, D]."""
    return kind.mean[row][:, None] + kind.residual[row].float()


def _warped(kind: KindStatistics, warps: list[Warp]) -> KindStatistics:
    """Measurements of warped values: an error there costs what it comes to, on average, when it is warped back."""
    means, fishers, residuals, sinks = [], [], [], []
    for row, warp in enumerate(warps):
        raw = _raw(kind, row)
        value = warp(raw)
        means.append(value.mean(1))
        residuals.append((value - value.mean(1, keepdim=True)).half())
        back = (raw.std(1) / value.std(1).clamp_min(1e-6))[..., None]
        fishers.append(back * kind.fisher[row] * back.mT)
        sinks.append(warp(kind.sink[row]))
    return replace(
        kind,
        mean=torch.stack(means),
        fisher=torch.stack(fishers),
        residual=torch.stack(residuals),
        sink=torch.stack(sinks),
    )

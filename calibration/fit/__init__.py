"""From measurements and a plan to a codec: `FITS[name](statistics).codec(plan)`, or `FitByHead` where heads differ."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from calibration.fit.closed_form import ClosedForm
from calibration.fit.codebooks import lloyd_max, rounded, uniform_levels
from calibration.fit.coder import FittedCodec, choose
from calibration.fit.reconstruction import Learned
from calibration.fit.splines import spline_levels
from calibration.plan import Plan
from calibration.statistics import Statistics
from vllm_kvsplice.layout import MAX_WIDTH
from vllm_kvsplice.names import FitName


class Fit(Protocol):
    """A fitting algorithm that has seen the measurements: what a plan chooses from."""

    @property
    def distortion(self) -> Tensor:
        """Fisher-weighted cost of each group at widths 0..8, [2, L, H, G, 9]."""

    def start(self, plan: Plan) -> FittedCodec:
        """The codec of `plan` before training, if any."""

    def codec(self, plan: Plan) -> FittedCodec:
        """The codec of `plan`."""


FITS: dict[FitName, Callable[[Statistics], Fit]] = {
    "pca": partial(ClosedForm.of, levels=rounded(lloyd_max)),
    "pca_spline": partial(ClosedForm.of, levels=rounded(spline_levels)),
    "pca_uniform": partial(ClosedForm.of, levels=uniform_levels),
    "kvsplice": partial(Learned.of, levels=rounded(lloyd_max)),
    "kvsplice_spline": partial(Learned.of, levels=rounded(spline_levels)),
    "kvsplice_uniform": partial(Learned.of, levels=uniform_levels),
}


# The widest that plans should choose, where wider ones are not worth their time: GPUs read evenly spaced codes of two
# planes best, and those of eight bits as slowly as any others (docs/gpu.md).
WIDEST: dict[FitName, int] = {"pca_uniform": 6, "kvsplice_uniform": 6}


class FitByHead:
    """The algorithm that a plan names for a head, and `default` for all others; distortions are those of `default`."""

    def __init__(self, statistics: Statistics, default: FitName) -> None:
        self._statistics, self._default = statistics, default
        self._made: dict[FitName, Fit] = {}

    @property
    def distortion(self) -> Tensor:
        """Fisher-weighted cost of each group at widths 0..8, [2, L, H, G, 9]; none gains by bits past `WIDEST`."""
        found, widest = self._fit(self._default).distortion, WIDEST.get(self._default, MAX_WIDTH)
        return found.gather(-1, torch.arange(MAX_WIDTH + 1).clamp_max(widest).expand_as(found))

    def start(self, plan: Plan) -> FittedCodec:
        """The codec of `plan` before training, if any."""
        return self._joined(plan, lambda fit: fit.start(plan))

    def codec(self, plan: Plan) -> FittedCodec:
        """The codec of `plan`."""
        return self._joined(plan, lambda fit: fit.codec(plan))

    def _fit(self, name: FitName) -> Fit:
        if name not in self._made:
            self._made[name] = FITS[name](self._statistics)
        return self._made[name]

    def _joined(self, plan: Plan, codec_of: Callable[[Fit], FittedCodec]) -> FittedCodec:
        names = [[name or self._default for name in heads] for heads in plan.fits] or [[self._default]]
        first, *others = sorted({name for heads in names for name in heads})
        joined = codec_of(self._fit(first))
        for name in others:
            chosen = torch.tensor([[own == name for own in heads] for heads in names])
            other = codec_of(self._fit(name))
            joined = FittedCodec(plan, choose(chosen, other.key, joined.key), choose(chosen, other.value, joined.value))
        return joined

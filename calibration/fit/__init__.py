"""From measurements and a plan to a codec: `FITS[name](statistics).codec(plan)`."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from calibration.fit.closed_form import ClosedForm
from calibration.fit.codebooks import lloyd_max
from calibration.fit.coder import FittedCodec
from calibration.fit.reconstruction import Learned
from calibration.fit.splines import spline_levels
from calibration.plan import Plan
from calibration.statistics import Statistics


class Fit(Protocol):
    """A fitting algorithm that has seen the measurements: what a plan chooses from."""

    @property
    def distortion(self) -> Tensor:
        """Fisher-weighted squared error of each group at widths 0..8, [2, L, H, G, 9]."""

    def start(self, plan: Plan) -> FittedCodec:
        """The codec of `plan` before training, if any."""

    def codec(self, plan: Plan) -> FittedCodec:
        """The codec of `plan`."""


FITS: dict[str, Callable[[Statistics], Fit]] = {
    "pca": partial(ClosedForm.of, levels=lloyd_max),
    "pca_spline": partial(ClosedForm.of, levels=spline_levels),
    "kvsplice": partial(Learned.of, levels=lloyd_max),
    "kvsplice_spline": partial(Learned.of, levels=spline_levels),
}

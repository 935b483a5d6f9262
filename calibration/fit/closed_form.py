"""`pca` and `pca_spline`: closed forms. A Fisher-weighted transform, and codebooks fitted to its latents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.fit.codebooks import Codebooks, LevelFit, fit_codebooks
from calibration.fit.coder import FittedCodec, KindCoder
from calibration.fit.transform import Transform, weighted_klt
from calibration.plan import Plan
from calibration.statistics import Statistics


@dataclass(frozen=True)
class ClosedForm:
    """Transforms and codebooks for every width, of keys and values: what a plan chooses from."""

    statistics: Statistics
    transforms: tuple[Transform, Transform]
    codebooks: tuple[Codebooks, Codebooks]

    @classmethod
    def of(cls, statistics: Statistics, levels: LevelFit) -> "ClosedForm":
        """Fit to `statistics`, with codebooks as `levels` makes them."""
        kinds = (statistics.key, statistics.value)
        key, value = (weighted_klt(kind) for kind in kinds)
        books = [
            fit_codebooks(kind.residual, kind.weight, t.analysis, t.importance, levels)
            for kind, t in zip(kinds, (key, value), strict=True)
        ]
        return cls(statistics, (key, value), (books[0], books[1]))

    @property
    def distortion(self) -> Tensor:
        """Fisher-weighted cost of each group at widths 0..8, [2, L, H, G, 9]."""
        return torch.stack([book.distortion for book in self.codebooks])

    def start(self, plan: Plan) -> FittedCodec:
        """The same as `codec`: nothing is trained."""
        return self.codec(plan)

    def codec(self, plan: Plan) -> FittedCodec:
        """The codec of `plan`."""
        coders = []
        for row, kind in enumerate((self.statistics.key, self.statistics.value)):
            transform, books, widths = self.transforms[row], self.codebooks[row], plan.widths[row]
            coders.append(
                KindCoder(
                    mean=kind.mean,
                    analysis=transform.analysis,
                    synthesis=transform.synthesis * books.gain_of(widths)[..., None, :],
                    importance=transform.importance,
                    widths=widths,
                    levels=books.of(widths),
                    unit=books.unit_of(widths),
                    sink=kind.sink,
                )
            )
        return FittedCodec(plan, *coders)

"""`kvsplice`, phase 1: transforms and codebooks learned on stored samples, so that coding costs least.

Transform and decoder are trained through the quantiser; now and then codebooks are fitted anew to the latents that came of
it. Every head is judged on samples that it was not trained on, and keeps what it started from where that is better.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.fit.closed_form import ClosedForm
from calibration.fit.codebooks import SHARED, LevelFit, fit_codebooks
from calibration.fit.coder import FittedCodec, KindCoder, choose
from calibration.fit.trainable import TrainableKind, latent_error
from calibration.plan import Plan
from calibration.statistics import KindStatistics, Statistics

_STEPS, _RATE, _CODEBOOKS_EVERY = 200, 0.02, 80
# Of all heads at once.
_BATCH = 256
# One sample in eight judges.
_HELD_OUT = 8


@dataclass(frozen=True)
class Learned:
    """A closed form that is trained once its plan is known."""

    closed_form: ClosedForm
    level_fit: LevelFit

    @classmethod
    def of(cls, statistics: Statistics, levels: LevelFit) -> "Learned":
        return cls(ClosedForm.of(statistics, levels), levels)

    @property
    def distortion(self) -> Tensor:
        """Of the closed form: [2, L, H, G, 9]."""
        return self.closed_form.distortion

    def start(self, plan: Plan) -> FittedCodec:
        """The codec of `plan` before training."""
        return self.closed_form.codec(plan)

    def codec(self, plan: Plan) -> FittedCodec:
        """The trained codec of `plan`."""
        fitted = self.start(plan)
        error = latent_error(fitted)
        statistics = self.closed_form.statistics
        key = _train(fitted.key, statistics.key, self.level_fit, error)
        value = _train(fitted.value, statistics.value, self.level_fit, error)
        return FittedCodec(plan, key, value)


@dataclass(frozen=True)
class _Samples:
    """Residuals [L, H, n, D] and their weights [L, H, n]."""

    residual: Tensor
    weight: Tensor

    def at(self, chosen: Tensor) -> "_Samples":
        return _Samples(self.residual[:, :, chosen], self.weight[:, :, chosen])


def reading_cost(kind: TrainableKind, metric: KindCoder, samples: _Samples) -> Tensor:
    """What reading back `samples` costs in the metric of `metric`, as `codebooks.read_back` counts it: [L, H]."""
    residual, weight = samples.residual.float(), samples.weight[:, :, None]
    latents, error = metric.analysis @ residual.mT, metric.analysis @ (kind(residual) - residual).mT
    shared = (error * latents * weight).mean(-1)
    return (((error.square() * weight).mean(-1) + SHARED * shared.square()) * metric.importance).sum(-1)


def _train(start: KindCoder, statistics: KindStatistics, level_fit: LevelFit, error: float) -> KindCoder:
    judging = torch.arange(statistics.residual.shape[2]) % _HELD_OUT == 0
    samples = _Samples(statistics.residual, statistics.weight)
    training, held_out = samples.at(~judging), samples.at(judging)
    kind = TrainableKind(start, error)
    optimizer = torch.optim.Adam([kind.analysis_step, kind.synthesis_step], lr=_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(_STEPS):
        if step and step % _CODEBOOKS_EVERY == 0:
            _refit(kind, training, level_fit)
        batch = training.at(torch.randint(training.weight.shape[2], (_BATCH,), generator=generator))
        optimizer.zero_grad()
        # In units of what is expected, so that the optimiser sees no tiny numbers.
        (reading_cost(kind, start, batch).sum() / error).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        coder = kind.coder()
        before, after = (reading_cost(k, start, held_out) for k in (TrainableKind(start, error), kind))
    return choose(after < before, coder, start)


def _refit(kind: TrainableKind, samples: _Samples, level_fit: LevelFit) -> None:
    """Codebooks for the latents as they now are."""
    with torch.no_grad():
        coder = kind.coder()
    books = fit_codebooks(samples.residual, samples.weight, coder.analysis, coder.importance, level_fit)
    kind.use(books.of(coder.widths), books.unit_of(coder.widths))

"""A codec whose transforms and means can be trained: the quantiser passes gradients straight through.

Parameters are steps from where training starts, in coordinates where they are alike: a unit step in any of them changes
what is read by about the error that quantisation leaves in one direction. So one learning rate fits all.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration.fit.coder import FittedCodec, KindCoder
from vllm_kvsplice.codec import HIGHEST_LEVEL, LEVELS, LOWEST_LEVEL
from vllm_kvsplice.layout import GROUP
from vllm_kvsplice.rotary import Rotary

# Boundaries between whole levels are multiples of a half: one table entry for each half.
_HALVES = 2 * (HIGHEST_LEVEL - LOWEST_LEVEL + 1)


class TrainableKind(nn.Module):
    """`coder` of any number of leading dimensions, with `error` what a latent is expected to cost."""

    def __init__(self, coder: KindCoder, error: float) -> None:
        super().__init__()
        self._coder = coder
        step = error**0.5
        # Columns of length `step` in the metric of the Fisher matrix: errors along them cost alike.
        self._directions = coder.synthesis * step / coder.importance.sqrt()[..., None, :]
        self._reach = (step / coder.importance.sqrt()).clamp_max(1)[..., None]
        self._identity = torch.eye(coder.mean.shape[-1], device=coder.mean.device)
        self.use(coder.levels, coder.unit)
        groups = (
            torch.arange(coder.widths.numel(), device=coder.mean.device)
            .view(coder.widths.shape)
            .repeat_interleave(GROUP, -1)
        )
        self._table_start = (groups * _HALVES - 2 * LOWEST_LEVEL)[..., None]
        self.analysis_step = nn.Parameter(torch.zeros_like(coder.analysis))
        self.synthesis_step = nn.Parameter(torch.zeros_like(coder.synthesis))
        self.mean_step = nn.Parameter(torch.zeros_like(coder.mean))

    def use(self, levels: Tensor, unit: Tensor) -> None:
        """Go on with these codebooks."""
        self._coder = replace(self._coder, levels=levels, unit=unit)
        self._table = _nearest_levels(levels)
        self._coded_unit = (unit * self._coder.coded)[..., None, :]

    def coder(self) -> KindCoder:
        """As trained so far; differentiable."""
        return replace(self._coder, mean=self.mean, analysis=self._analysis, synthesis=self._synthesis)

    @property
    def mean(self) -> Tensor:
        return self._coder.mean + (self._directions @ self.mean_step[..., None])[..., 0]

    @property
    def _analysis(self) -> Tensor:
        # Latents keep their variance: seen straight through a quantiser, larger ones always look better.
        mixing = self._identity + self._reach * self.analysis_step
        return mixing / mixing.norm(dim=-1, keepdim=True) @ self._coder.analysis

    @property
    def _synthesis(self) -> Tensor:
        return self._coder.synthesis + self._directions @ self.synthesis_step

    def forward(self, residual: Tensor) -> Tensor:
        """Residuals [.., T, D] as they are read back."""
        latents = (self._analysis / self._coder.unit[..., None]) @ residual.mT
        # Straight through (Bengio et al., 2013): levels forward, their gradient as that of the latents.
        read = latents + (self._nearest(latents.detach()) - latents).detach()
        return ((self._synthesis * self._coded_unit) @ read).mT

    def _nearest(self, latents: Tensor) -> Tensor:
        half = (latents * 2).floor().clamp(2 * LOWEST_LEVEL, 2 * HIGHEST_LEVEL + 1).long()
        return self._table[half + self._table_start]


def _nearest_levels(levels: Tensor) -> Tensor:
    """The level nearest to each half of a whole number, one codebook of `levels` [.., G, 256] after the other."""
    books = levels.reshape(-1, LEVELS)
    edges = ((books[:, 1:] + books[:, :-1]) / 2).masked_fill(books[:, 1:] <= books[:, :-1], torch.inf)
    middles = torch.arange(_HALVES, device=levels.device) / 2 + LOWEST_LEVEL + 0.25
    nearest = torch.searchsorted(edges.contiguous(), middles.expand(len(books), -1).contiguous())
    return books.gather(1, nearest).flatten()


class TrainableCodec(nn.Module):
    """All compressed layers, as a tap (`calibration.attention`) under which a model attends to what is read back."""

    def __init__(self, fitted: FittedCodec, layers: Sequence[int], rotary: Rotary | None) -> None:
        super().__init__()
        self._plan, self._rotary = fitted.plan, rotary and rotary.to(fitted.key.mean.device)
        error = latent_error(fitted)
        self._kinds = {
            layer: (TrainableKind(fitted.key.layer(row), error), TrainableKind(fitted.value.layer(row), error))
            for row, layer in enumerate(layers)
        }
        # So that torch knows of their parameters.
        self.layers = nn.ModuleList(nn.ModuleList(kinds) for kinds in self._kinds.values())

    def forward(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H, T, D] as read back; position 0 as it is."""
        if layer not in self._kinds:
            return key, value
        keys, values = self._kinds[layer]
        return _read(keys, key, self._rotary and self._rotary.at(layer)), _read(values, value, None)

    @torch.no_grad()
    def fitted(self) -> FittedCodec:
        """As trained so far."""
        coders = [[kind.coder() for kind in kinds] for kinds in self._kinds.values()]
        keys, values = zip(*coders, strict=True)
        return FittedCodec(self._plan, KindCoder.of_layers(keys), KindCoder.of_layers(values))


def latent_error(fitted: FittedCodec) -> float:
    """What each coded latent is expected to cost, on average."""
    coded = float(fitted.key.coded.sum() + fitted.value.coded.sum())
    return max(fitted.plan.distortion, 1e-12) / max(coded, 1)


def _read(kind: TrainableKind, vector: Tensor, rotary: Rotary | None) -> Tensor:
    exact = vector[0].float()
    mean = kind.mean[:, None]
    if rotary:
        mean = rotary.rotate(mean.expand_as(exact), torch.arange(exact.shape[1], device=exact.device))
    read = mean + kind(exact - mean)
    return torch.cat((exact[:, :1], read[:, 1:]), 1)[None].to(vector.dtype)

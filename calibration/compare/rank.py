"""Truncated rank: the strongest principal components of rotated keys and of values, in 16 bits.

As in Eigen Attention (arXiv:2408.05646) and Loki (arXiv:2406.02542), head by head. Means are constants and cost nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.attention import tapped
from calibration.compare.stores import BFLOAT16, Field, Store
from calibration.statistics import FIRST_ORDINARY


@dataclass(frozen=True)
class Components:
    """Of a layer's keys or values: mean [H, D] and principal axes [H, D, D], a column each, the strongest first."""

    mean: Tensor
    axes: Tensor


@dataclass(frozen=True)
class Truncated(Store):
    """The first `rank` components in bfloat16."""

    components: Components
    rank: int

    def encode(self, x: Tensor, positions: Tensor) -> tuple[Field, ...]:
        latents = (x - self.components.mean.to(x)[:, None]) @ self.components.axes.to(x)[..., : self.rank]
        return BFLOAT16.encode(latents, positions)

    def decode(self, fields: tuple[Field, ...], positions: Tensor) -> Tensor:
        latents = BFLOAT16.decode(fields, positions)
        return (
            latents @ self.components.axes.to(latents)[..., : self.rank].mT + self.components.mean.to(latents)[:, None]
        )


@torch.no_grad()
def principal_components(
    model: PreTrainedModel, windows: Tensor, progress: Callable[[], None]
) -> dict[int, tuple[Components, Components]]:
    """Of the keys and the values of every full-attention layer on token ids [W, T], first tokens left out."""
    totals: dict[tuple[int, int], Tensor] = {}
    outers: dict[tuple[int, int], Tensor] = {}

    def tap(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for kind, x in enumerate((key, value)):
            ordinary = x[0, :, FIRST_ORDINARY:].double()
            totals[layer, kind] = totals.get((layer, kind), 0) + ordinary.sum(1)
            outers[layer, kind] = outers.get((layer, kind), 0) + ordinary.mT @ ordinary
        return key, value

    for window in windows:
        with tapped(model, tap):
            model(window[None].to(model.device), use_cache=False)
        progress()
    count = len(windows) * (windows.shape[1] - FIRST_ORDINARY)
    found = {place: _components(total, outers[place], count) for place, total in totals.items()}
    return {layer: (found[layer, 0], found[layer, 1]) for layer, kind in found if kind == 0}


def _components(total: Tensor, outer: Tensor, count: int) -> Components:
    mean = total / count
    covariance = outer / count - mean[:, :, None] * mean[:, None]
    return Components(mean.float(), torch.linalg.eigh(covariance).eigenvectors.flip(-1).float())

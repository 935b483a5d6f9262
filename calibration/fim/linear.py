"""Spectra of the linear maps inside attention: of their weights, and of what comes out of them on real text.

Weights use nearly all of their directions, activations few: that is why a cache of activations compresses and the weights
that make them do not. Works for every Hugging Face model whose attention modules know their layer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calibration.fim import spectrum


class Moments:
    """Running mean and second moments of vectors [..., d], in float32 [d, d]: their memory does not grow with the text."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.outer: Tensor | float = 0.0

    def add(self, vectors: Tensor) -> None:
        vectors = vectors.detach().flatten(0, -2).float()
        self.count += len(vectors)
        self.total = self.total + vectors.sum(0)
        self.outer = self.outer + vectors.mT @ vectors

    def covariance(self) -> Tensor:
        """[d, d]."""
        assert isinstance(self.total, Tensor)
        mean = self.total / self.count
        return self.outer / self.count - mean[:, None] * mean


def attention_maps(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Every linear map directly inside an attention module, as ``("layer3/k_proj", map)``."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            for name, child in module.named_children():
                if isinstance(child, (nn.Linear, Conv1D)):
                    yield f"layer{module.layer_idx}/{name}", child


@torch.no_grad()
def map_metrics(model: PreTrainedModel, windows: Tensor, progress: Callable[[], None]) -> dict[str, float]:
    """`calibration.fim.spectrum.variance_metrics` of weights and activations of every map, on token ids [W, T].

    Named ``layer3/k_proj_weight_k95`` and ``layer3/k_proj_activation_k95``; n is the smaller side of the map for both.
    """
    maps, moments = dict(attention_maps(model)), {}
    with ExitStack() as hooks:
        for name, module in maps.items():
            moments[name] = Moments()
            hooks.callback(module.register_forward_hook(_adding_to(moments[name])).remove)
        for window in windows:
            model(window[None].to(model.device), use_cache=False)
            progress()
    found: dict[str, float] = {}
    for name, module in maps.items():
        assert isinstance(module.weight, Tensor)
        weights = weight_spectrum(module.weight)
        activations = spectrum.eigenvalues(moments[name].covariance().cpu())[: len(weights)]
        for kind, values in (("weight", weights), ("activation", activations)):
            found |= {f"{name}_{kind}_{m}": float(v) for m, v in spectrum.variance_metrics(values).items()}
    return found


def weight_spectrum(weight: Tensor) -> Tensor:
    """Squared singular values of a matrix, largest first: as many as its smaller side."""
    weight = weight.detach().double().cpu()
    return spectrum.eigenvalues(weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight)


def _adding_to(moments: Moments) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        moments.add(output)

    return hook

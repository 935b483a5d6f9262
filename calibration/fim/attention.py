"""The Fisher matrix of attention: of the softmax over tokens, averaged over queries, for every layer and query head.

For one query that attends with probabilities p the Fisher matrix with respect to its logits is F = diag(p) - p p^T, the
covariance of one draw from p (Amari, Information Geometry and Its Applications, section 2.2). Averaged over the queries of
windows of T tokens it is a T x T matrix, whatever the amount of text: diag(mean of p) - P^T P / queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.attention import watched
from calibration.fim import spectrum
from calibration.fim.runs import Heads
from vllm_kvsplice.errors import KVSpliceError

# Tokens of a window: the matrices grow with their square (SmolLM2: 141 MB at 256), their eigenvalues take its cube.
CONTEXT = 256
WINDOWS = 8


class AttentionFisher:
    """Running sums of F over the queries that were seen, float64 [G * H, T, T] for each layer."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.queries = 0

    def add(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take in one layer of one batch: `query` [B, G * H, T, D] and `key` [B, H, T, D], both rotated."""
        if layer not in self.sums:
            tokens = query.shape[2]
            self.sums[layer] = torch.zeros(query.shape[1], tokens, tokens, dtype=torch.float64)
        for queries, keys in zip(query, key, strict=True):
            group = queries.shape[0] // keys.shape[0]
            # Head by head, so that only one T x T matrix of probabilities exists at a time.
            for head, total in enumerate(self.sums[layer]):
                logits = queries[head].float() @ keys[head // group].float().mT * scaling
                total += fisher(causal_softmax(logits)).cpu()

    def spectra(self) -> dict[int, Tensor]:
        """Eigenvalues [G * H, T] of the mean F of every layer, largest first."""
        return {layer: spectrum.eigenvalues(total / self.queries) for layer, total in sorted(self.sums.items())}


def by_head(spectra: dict[int, Tensor]) -> Heads:
    """Metrics of every query head, from eigenvalues [heads, T] by layer."""
    found = {layer: spectrum.metrics(values) for layer, values in spectra.items()}
    return {
        (layer, head): {name: float(value[head]) for name, value in metrics.items()}
        for layer, metrics in found.items()
        for head in range(len(spectra[layer]))
    }


def causal_softmax(logits: Tensor) -> Tensor:
    """Probabilities [T, T] in float64: the query of a row attends to the columns up to its own."""
    hidden = torch.ones_like(logits, dtype=torch.bool).triu(1)
    return logits.double().masked_fill(hidden, -torch.inf).softmax(-1)


def fisher(probabilities: Tensor) -> Tensor:
    """Sum over the rows p of `probabilities` [Q, T] of diag(p) - p p^T: [T, T]."""
    return torch.diag(probabilities.sum(0)) - probabilities.mT @ probabilities


@torch.no_grad()
def attention_spectra(model: PreTrainedModel, windows: Tensor, progress: Callable[[], None]) -> dict[int, Tensor]:
    """Eigenvalues [heads, T] of every full-attention layer's mean Fisher matrix on token ids `windows` [W, T].

    Raises:
        KVSpliceError: attention was not finite.

    """
    measured = AttentionFisher()
    with watched(model, measured.add):
        for window in windows:
            model(window[None].to(model.device), use_cache=False)
            measured.queries += len(window)
            progress()
    if not all(total.isfinite().all() for total in measured.sums.values()):
        raise KVSpliceError("the model's attention is not finite; check that it generates sound text at all")
    return measured.spectra()

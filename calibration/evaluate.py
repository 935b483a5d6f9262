"""Perplexity of a model as it is and with its cache compressed, in Hugging Face transformers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel

from calibration.attention import AS_STORED, Reading, Tap, tapped
from vllm_kvsplice.codec import LayerCodec

# all: every key and value as stored, position 0 exact. serving: position 0 as the server has it, too.
Mode = Literal["all", "serving"]


@dataclass(frozen=True)
class Evaluation:
    """What compression does to predictions, over `tokens` of them.

    Attributes:
        baseline_ppl, ppl: perplexity without and with it.
        divergence: KL(uncompressed || compressed) in nats per token: how much log perplexity grows on text that the model
            says itself. On other text about as much, and less noisy than a difference of perplexities.

    """

    baseline_ppl: float
    ppl: float
    divergence: float
    tokens: int

    @property
    def change_percent(self) -> float:
        return (self.ppl / self.baseline_ppl - 1) * 100


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tap: Tap,
    windows: Tensor,
    progress: Callable[[], None] = lambda: None,
    reading: Reading = AS_STORED,
    skip: int = 1,
) -> Evaluation:
    """Judge what `tap` does on windows of text; where a prompt is read exactly, on what follows it.

    Args:
        model: loaded with `calibration.models.load_model`.
        tap: what attention reads, as of `compressing_tap`.
        windows: token ids [W, T].
        progress: called once per window.
        reading: which tokens are read exactly.
        skip: first tokens of a window that are not judged, at least 1; those of an exact prompt are not either.

    """
    skip = max(skip, reading.prompt)
    plain = squeezed = divergence = 0.0
    for window in windows.to(model.device):
        wanted = _log_probabilities(model, window, skip)
        with tapped(model, tap, reading):
            said = _log_probabilities(model, window, skip)
        plain += _loss(wanted, window[skip:])
        squeezed += _loss(said, window[skip:])
        # In place: what is as large as a window's logits takes longer to find room for than to work out.
        divergence -= float(said.sub_(wanted).mul_(wanted.exp_()).sum())
        progress()
    tokens = len(windows) * (windows.shape[1] - skip)
    return Evaluation(math.exp(plain / tokens), math.exp(squeezed / tokens), divergence / tokens, tokens)


def compressing_tap(codecs: Mapping[int, LayerCodec], mode: Mode) -> Tap:
    """A tap under which a model attends to what the codec gives back."""

    def tap(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in codecs:
            return key, value
        pairs = [_restore(codecs[layer], k, v, mode) for k, v in zip(key, value, strict=True)]
        keys, values = zip(*pairs, strict=True)
        return torch.stack(keys), torch.stack(values)

    return tap


def _restore(codec: LayerCodec, key: Tensor, value: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values [H, T, D] as stored."""
    positions = torch.arange(key.shape[1], device=key.device)
    restored = codec.reconstruct(key.transpose(0, 1), value.transpose(0, 1), positions)
    stored = [x.transpose(0, 1).to(key.dtype) for x in restored]
    if mode == "all":
        stored[0][:, 0], stored[1][:, 0] = key[:, 0], value[:, 0]
    return stored[0], stored[1]


def _log_probabilities(model: PreTrainedModel, window: Tensor, skip: int) -> Tensor:
    """What a model says of a window's tokens [T] after the first `skip`: float32 [T - skip, vocabulary]."""
    logits = model(window[None], use_cache=False).logits[0, skip - 1 : -1].float()
    # Finite where a model rules a token out, so that those have no part in a divergence.
    return logits.log_softmax(-1).clamp_min_(-1e30)


@torch.no_grad()
def summed_loss(model: PreTrainedModel, window: Tensor) -> float:
    """Summed negative log-likelihood of a window's tokens [T] after its first, in nats."""
    window = window.to(model.device)
    return _loss(_log_probabilities(model, window, 1), window[1:])


def _loss(said: Tensor, tokens: Tensor) -> float:
    return float(nll_loss(said, tokens, reduction="sum"))

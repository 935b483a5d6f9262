"""What every fit ends in: the numbers of a plan's codec, and the tensors that an artifact holds for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.plan import Plan
from vllm_kvsplice.artifact import pack_levels
from vllm_kvsplice.layout import GROUP


@dataclass(frozen=True)
class KindCoder:
    """Keys or values of L layers (or of one: then without L), H heads, D dimensions, R = D latents in G groups.

    Attributes:
        mean: [L, H, D]; of keys before rotation.
        analysis: residual to latents of about unit variance, [L, H, R, D].
        synthesis: and back, [L, H, D, R].
        importance: what an error of unit variance in a latent costs, [L, H, R].
        widths: the plan's, in bits, int64 [L, H, G].
        levels: codebooks, whole numbers [L, H, G, 256]; past 2**b they repeat the last.
        unit: what a whole number stands for in a latent, [L, H, R].
        sink: position 0 for S first tokens, [L, H, S, D].

    """

    mean: Tensor
    analysis: Tensor
    synthesis: Tensor
    importance: Tensor
    widths: Tensor
    levels: Tensor
    unit: Tensor
    sink: Tensor

    @property
    def coded(self) -> Tensor:
        """Which latents have bits, float [L, H, R]."""
        return (self.widths > 0).repeat_interleave(GROUP, -1).float()

    def layer(self, row: int) -> "KindCoder":
        return KindCoder(*(tensor[row] for tensor in vars(self).values()))

    def to(self, device: torch.device) -> "KindCoder":
        return KindCoder(*(tensor.to(device) for tensor in vars(self).values()))

    @classmethod
    def of_layers(cls, layers: Sequence["KindCoder"]) -> "KindCoder":
        return cls(*(torch.stack(tensors) for tensors in zip(*(vars(x).values() for x in layers), strict=True)))

    def tensors(self) -> dict[str, Tensor]:
        """As in an artifact (`vllm_kvsplice.codec.KindCodec`), where latents count in units."""
        sink, scale = fit_sinks(self.sink, self.analysis)
        return {
            "mean": self.mean,
            "analysis": self.analysis * (self.coded / self.unit)[..., None],
            "synthesis": self.synthesis * (self.coded * self.unit)[..., None, :],
            "levels": pack_levels(self.levels, self.widths.tolist()),
            "sink": sink,
            "sink_scale": scale,
        }


def choose(first: Tensor, one: KindCoder, other: KindCoder) -> KindCoder:
    """Of heads [L, H] where `first` is true, those of `one`, else of `other`."""
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return KindCoder(*(torch.where(first.view(*first.shape, *[1] * (a.dim() - 2)), a, b) for a, b in pairs))


@dataclass(frozen=True)
class FittedCodec:
    """A plan and its coders."""

    plan: Plan
    key: KindCoder
    value: KindCoder

    def to(self, device: torch.device) -> "FittedCodec":
        return FittedCodec(self.plan, self.key.to(device), self.value.to(device))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What an artifact holds, all but the rotary frequencies."""
        kinds = {"key": self.key, "value": self.value}
        return {f"{kind}.{name}": tensor for kind, coder in kinds.items() for name, tensor in coder.tensors().items()}


def fit_sinks(first_tokens: Tensor, analysis: Tensor) -> tuple[Tensor, Tensor]:
    """What stands at position 0, [L, H, D], and the standard deviation of each latent around it, [L, H, R].

    The attention sink of most layers hardly depends on the first token, and much attention falls on it: in units of its own
    deviation it is coded far more finely than an ordinary token.
    """
    sink = first_tokens.mean(2)
    latents = torch.einsum("lhrd,lhsd->lhrs", analysis, first_tokens - sink[:, :, None])
    return sink, latents.square().mean(-1).sqrt()

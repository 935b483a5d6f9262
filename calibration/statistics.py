"""What calibration measures: one stream over the text, in memory that does not grow with it."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.attention import Reading, tapped
from calibration.text import PIECE
from vllm_kvsplice.artifact import ModelShape
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.rotary import Rotary

# Tokens whose keys and values are kept whole, for covariances and codebooks: as many as are measured by default.
SAMPLES = 16384
# Share of its mean eigenvalue added to every direction of a Fisher matrix, so that no direction is free.
FISHER_FLOOR = 0.05
# First tokens from which the sink at position 0 is measured.
SINK_TOKENS = 256
# Names what a file of measurements holds; files of another are measured anew.
_FORMAT = b"Fisher information of what the model predicts"
# Of the loss with everything read as stored, in what is minimised for reading beside an exact window. Without it three bits
# cost SmolLM2 a fifth less beside a window, and six times as much without one (DECISIONS.md).
NEAR_SHARE = 0.05
# The sink and the tokens it still colours say nothing about ordinary tokens.
FIRST_ORDINARY = 4


@dataclass
class KindStatistics:
    """Measurements of the keys or the values of L layers, H heads, D dimensions.

    Attributes:
        mean: [L, H, D]; of keys before rotation.
        fisher: Fisher information of all next-token distributions about this key or value, [L, H, D, D]: E[g g^T], g the
            gradients of `fisher_noise`. Units: nats per squared unit of the key or value. Beside an exact window, where it
            is read as stored, and `NEAR_SHARE` of the same wherever it is read.
        residual: sampled tokens less their mean as the codec sees them (keys after rotation), float16 [L, H, n, D].
        weight: how much the divergence feels errors of each of them, as a share of the average, [L, H, n].
        sink: position 0 for S different first tokens, [L, H, S, D].

    """

    mean: Tensor
    fisher: Tensor
    residual: Tensor
    weight: Tensor
    sink: Tensor


@dataclass
class Statistics:
    """Measurements of both kinds.

    Attributes:
        layers: the full-attention layers they belong to, ascending.
        key, value: theirs.
        positions: of the sampled tokens, int64 [n].
        tokens: how many were measured.

    """

    layers: tuple[int, ...]
    key: KindStatistics
    value: KindStatistics
    positions: Tensor
    tokens: int


@dataclass
class _Running:
    """Sums of one layer and kind over the stream."""

    total: Tensor
    outer: Tensor
    samples: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    @classmethod
    def like(cls, attended: "_Attended") -> "_Running":
        heads, _, dim = attended.vector.shape
        return cls(torch.zeros(heads, dim, dtype=torch.float64), torch.zeros(heads, dim, dim, dtype=torch.float64))

    def add(self, attended: "_Attended", ordinary: Tensor, chosen: Tensor, rotary: Rotary | None) -> None:
        vector, gradients = attended.vector[:, ordinary].float(), attended.gradients[:, :, ordinary].float()
        centred = rotary.unrotate(vector, ordinary) if rotary else vector
        self.total += centred.sum(1)
        self.outer += torch.einsum("khtd,khte->hde", gradients, gradients)
        self.samples.append(attended.vector[:, chosen].clone())
        self.gradients.append(attended.gradients[:, :, chosen].clone())


class _Attended(NamedTuple):
    """Keys or values of one window [H, T, D], and gradients g of its Fisher information [K, H, T, D].

    Of what is read as stored, and under an exact window also of all that is read, in smaller units.
    """

    vector: Tensor
    gradients: Tensor


def collect(
    model: PreTrainedModel,
    windows: Tensor,
    rotary: Rotary | None,
    *,
    recent: int = 0,
    seed: int = 0,
    progress: Callable[[], None],
) -> Statistics:
    """Measure `model` on `windows` with one forward and one backward pass each.

    Args:
        model: loaded by `calibration.models.load_model`; its parameters must not require gradients.
        windows: token ids, int64 [W, T].
        rotary: the model's rotary embedding, None if its keys carry none.
        recent: W of the exact window that the codec will be read beside.
        seed: of the choice of sampled tokens, and of random gradients.
        progress: called after every window.

    Raises:
        KVSpliceError: no layer's attention can be reached, or a measurement is not finite.

    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator(model.device).manual_seed(seed)
    ordinary = torch.arange(FIRST_ORDINARY, windows.shape[1])
    sums: dict[int, tuple[_Running, _Running]] = {}
    sampled_at: list[Tensor] = []
    for index, window in enumerate(windows):
        quota = (index + 1) * SAMPLES // len(windows) - index * SAMPLES // len(windows)
        chosen = ordinary[torch.randperm(len(ordinary), generator=generator)[:quota]]
        sampled_at.append(chosen)
        for layer, (key, value) in _keys_values_and_gradients(model, window, recent, noise).items():
            if layer not in sums:
                sums[layer] = (_Running.like(key), _Running.like(value))
            key_sums, value_sums = sums[layer]
            key_sums.add(key, ordinary, chosen, rotary and rotary.at(layer))
            value_sums.add(value, ordinary, chosen, None)
        progress()
    if not sums:
        raise KVSpliceError(
            f"{type(model).__name__} has no full attention that goes through transformers' attention interface, "
            "so there is nothing that could be compressed"
        )
    count = len(windows) * len(ordinary)
    sinks = _sinks(model, windows, generator)
    layers = tuple(sorted(sums))
    positions = torch.cat(sampled_at)
    kinds = [_finish([sums[i][k] for i in layers], [sinks[i][k] for i in layers], count) for k in (0, 1)]
    _subtract_mean(kinds[0], positions, [rotary and rotary.at(layer) for layer in layers])
    _subtract_mean(kinds[1], positions, [None] * len(layers))
    return Statistics(layers, kinds[0], kinds[1], positions, windows.numel())


def _keys_values_and_gradients(
    model: PreTrainedModel, window: Tensor, recent: int, noise: torch.Generator
) -> dict[int, tuple[_Attended, _Attended]]:
    """What every full-attention layer attends to on `window` [T], keys and values."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def keep(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Clones, because what the model reads later must be what the gradient is taken of.
        stored = key.clone(), value.clone()
        for tensor in (key, value, *stored) if recent else stored:
            tensor.retain_grad()
        found[layer] = [(key, stored[0]), (value, stored[1])]
        return stored

    window = window.to(model.device)
    embedded = model.get_input_embeddings()(window[None]).requires_grad_(True)
    with torch.enable_grad(), tapped(model, keep, Reading(recent)):
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        logits.backward(fisher_noise(logits.detach(), noise))
    return {layer: (_attended(*key, recent), _attended(*value, recent)) for layer, (key, value) in found.items()}


def fisher_noise(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Random gradients of logits [.., V] whose covariance is the Fisher information diag(p) - p p^T of p = softmax(logits).

    So are those of the loss on labels that the model draws itself, but these have no rare, large ones. The loss on the
    text's own labels has another covariance (Kunstner et al., 2019, "Limitations of the empirical Fisher approximation").
    """
    root = logits.softmax(-1).sqrt_()
    # Eight signs of each random word: a tenth of the time that one draw a sign takes.
    words = torch.empty(-(-root.numel() // 8), dtype=torch.int64, device=root.device)
    signs = words.random_(-(2**63), None, generator=generator).view(torch.int8)[: root.numel()].bitwise_and_(2).sub_(1)
    drawn = root * signs.view_as(root)
    return drawn.sub_(root.square_().mul_(drawn.sum(-1, keepdim=True)))


def _attended(tensor: Tensor, stored: Tensor, recent: int) -> _Attended:
    assert stored.grad is not None
    gradients = [stored.grad[0]]
    if recent:
        assert tensor.grad is not None
        gradients.append(NEAR_SHARE**0.5 * tensor.grad[0])
    return _Attended(stored.detach()[0].cpu(), torch.stack(gradients).cpu())


def _sinks(model: PreTrainedModel, windows: Tensor, generator: torch.Generator) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values [H, S, D] at position 0: they depend on the first token alone, so one-token texts suffice."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found[layer] = (_first_tokens(key), _first_tokens(value))
        return key, value

    tokens = windows.flatten()
    first = tokens[torch.randint(len(tokens), (SINK_TOKENS,), generator=generator)]
    with torch.no_grad(), tapped(model, keep):
        model(first[:, None].to(model.device), use_cache=False)
    return found


def _first_tokens(attended: Tensor) -> Tensor:
    """[H, S, D] at position 0 of `attended` [S, H, T, D]."""
    return attended[:, :, 0].transpose(0, 1).float().cpu()


def _finish(running: list[_Running], sinks: list[Tensor], count: int) -> KindStatistics:
    fisher = torch.stack([r.outer for r in running]).div(count).float()
    statistics = KindStatistics(
        mean=torch.stack([r.total for r in running]).div(count).float(),
        fisher=fisher,
        residual=torch.stack([torch.cat(r.samples, 1) for r in running]),
        weight=torch.stack([_weights(torch.cat(r.gradients, 2), g) for r, g in zip(running, fisher, strict=True)]),
        sink=torch.stack(sinks),
    )
    for name, tensor in vars(statistics).items():
        if not tensor.isfinite().all():
            raise KVSpliceError(
                f"the model produced {name} values that are not finite; check that it generates sound text at all"
            )
    return statistics


def with_floor(fisher: Tensor) -> Tensor:
    """Fisher matrices [.., D, D] in which no direction is free, float64."""
    mean = fisher.double().diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    return fisher.double() + FISHER_FLOOR * torch.diag_embed(mean[..., None].expand(fisher.shape[:-1]))


def _weights(gradients: Tensor, fisher: Tensor) -> Tensor:
    """g^T G^-1 g of tokens, summed over gradients [K, H, n, D], with Fisher matrices G [H, D, D]; shares of the mean."""
    inverse = torch.linalg.inv(with_floor(fisher)).float()
    felt = ((gradients.float() @ inverse) * gradients.float()).sum((0, -1))
    return felt / felt.mean(-1, keepdim=True).clamp_min(1e-30)


def _subtract_mean(statistics: KindStatistics, positions: Tensor, rotations: Sequence[Rotary | None]) -> None:
    """Turn raw samples into residuals, layer by layer so that no second copy of all samples exists."""
    residual = torch.empty(statistics.residual.shape, dtype=torch.float16)
    for row, (mean, rotary) in enumerate(zip(statistics.mean, rotations, strict=True)):
        offset = mean[:, None].expand(-1, len(positions), -1)
        offset = rotary.rotate(offset, positions) if rotary else offset
        residual[row] = statistics.residual[row].float() - offset
    statistics.residual = residual


def fingerprint(model: PreTrainedModel, windows: Tensor, own: int, seed: int, recent: int) -> str:
    """Names a measurement: the model's shape and weights (sampled), text, how much the model itself said, seed, window."""
    digest = hashlib.sha256(_FORMAT + ModelShape.of(model.config).model_dump_json().encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    digest.update(str(tuple(windows.shape)).encode() + windows.numpy().tobytes())
    digest.update(f"{own} {PIECE} {seed}".encode())
    if recent:
        digest.update(f" {recent} {NEAR_SHARE}".encode())
    return digest.hexdigest()


def save_statistics(statistics: Statistics, file: Path, key: str) -> None:
    """Keep measurements in a safetensors file, under the `fingerprint` of what was measured."""
    tensors = {f"{kind}.{name}": t for kind in ("key", "value") for name, t in vars(getattr(statistics, kind)).items()}
    tensors["positions"] = statistics.positions
    metadata = {"fingerprint": key, "layers": json.dumps(statistics.layers), "tokens": str(statistics.tokens)}
    save_tensors(tensors, file, metadata)


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, the whole of it or nothing; its directory is made if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, staging, metadata)
        staging.replace(file)
    finally:
        staging.unlink(missing_ok=True)


def load_statistics(file: Path, key: str) -> Statistics | None:
    """Measurements kept under `key`, or None where the file is missing or holds others."""
    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("fingerprint") != key:
                return None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except safetensors.SafetensorError as error:
        raise KVSpliceError(
            f"{file} holds no measurements ({error}); delete it or name another --statistics"
        ) from error
    names = KindStatistics.__dataclass_fields__
    key_kind, value_kind = (KindStatistics(**{n: tensors[f"{kind}.{n}"] for n in names}) for kind in ("key", "value"))
    layers = tuple(json.loads(metadata["layers"]))
    return Statistics(layers, key_kind, value_kind, tensors["positions"], int(metadata["tokens"]))

"""Phase 2: the codec trained on its task. The model is frozen and reads through the codec; what it says must stay the same.

The loss is the divergence KL(uncompressed || compressed) of next-token distributions, as in distillation (Hinton et al.,
2015), at every position of windows of text; every attended key and value is compressed (mode `all`, no exact window).
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from calibration.attention import Reading, Tap, tapped
from calibration.evaluate import evaluate
from calibration.fit.coder import FittedCodec
from calibration.fit.trainable import TrainableCodec
from calibration.statistics import save_tensors
from vllm_kvsplice.rotary import Rotary

# Tokens of one step, and steps over which the rate rises.
TOKENS = 512
_WARM_UP = 10
_BETAS = (0.9, 0.99)
# How often training is judged on held-out text and kept in its checkpoint, and after how many judgements in vain it ends.
_CHECKS, _PATIENCE = 4, 3


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `rate` in units of the error that quantisation leaves, falling to 0 along half a cosine.

    Training is judged beside an exact window of `recent` tokens.
    """

    steps: int
    rate: float = 1e-3
    seed: int = 0
    recent: int = 0

    def rate_at(self, step: int) -> float:
        return self.rate * min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / self.steps)) / 2

    @property
    def checks(self) -> set[int]:
        """Numbers of finished steps after which training is judged."""
        return {math.ceil(self.steps * check / _CHECKS) for check in range(1, _CHECKS + 1)}


@dataclass
class _State:
    """What a checkpoint holds besides the parameters: the best ones, and how far training is."""

    best: dict[str, Tensor]
    best_kl: float
    step: int = 0
    in_vain: int = 0


@dataclass(frozen=True)
class Finetuned:
    """The trained codec, and divergences on held-out text before and after, in nats per token."""

    codec: FittedCodec
    kl_before: float
    kl_after: float


def finetune(
    model: PreTrainedModel,
    fitted: FittedCodec,
    layers: tuple[int, ...],
    rotary: Rotary | None,
    windows: Tensor,
    held_out: Tensor,
    schedule: Schedule,
    progress: Callable[[], None],
    checkpoint: Path | None = None,
) -> Finetuned:
    """Train the transforms and means of `fitted` so that `model` says what it says uncompressed.

    Args:
        model: loaded by `calibration.models.load_model`.
        fitted: where training starts; its widths and codebooks stay.
        layers: the model's numbers of the layers of `fitted`.
        rotary: the model's rotary embedding, None without.
        windows: token ids to train on, int64 [W, T].
        held_out: token ids to judge on; the best codec is returned, which may be `fitted` itself.
        schedule: how long, how fast.
        progress: called after every step.
        checkpoint: file that the same training goes on from if it stopped there, and that is removed at its end.

    """
    codec = TrainableCodec(fitted.to(model.device), layers, rotary)
    optimizer = torch.optim.Adam(codec.parameters(), betas=_BETAS)
    reading = Reading(schedule.recent)
    before = evaluate(model, codec, held_out, reading=reading).divergence
    state = _State(_copy(codec), before)
    key = _key(fitted, windows, held_out, schedule) if checkpoint else ""
    if checkpoint:
        state = _resume(checkpoint, key, codec, optimizer) or state
    for _ in range(state.step):
        progress()
    examples = _examples(windows, schedule)
    for step in range(state.step, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        optimizer.zero_grad()
        _loss(model, codec, examples[step].to(model.device)).backward()
        optimizer.step()
        progress()
        if step + 1 in schedule.checks:
            _judge(state, evaluate(model, codec, held_out, reading=reading).divergence, codec, step + 1)
            if checkpoint:
                _keep(checkpoint, key, codec, optimizer, state)
            if state.in_vain == _PATIENCE:
                break
    codec.load_state_dict(state.best)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return Finetuned(codec.fitted().to(torch.device("cpu")), before, state.best_kl)


def _loss(model: PreTrainedModel, tap: Tap, tokens: Tensor) -> Tensor:
    """Cross entropy with the uncompressed model on tokens [T], in nats per token: the divergence and a constant."""
    with torch.no_grad():
        wanted = model(tokens[None], use_cache=False).logits[0].float().softmax(-1)
    with tapped(model, tap):
        said = model(tokens[None], use_cache=False).logits[0].float()
    return cross_entropy(said, wanted)


def _key(fitted: FittedCodec, windows: Tensor, held_out: Tensor, schedule: Schedule) -> str:
    """Names what is trained, on what and how."""
    digest = hashlib.sha256(repr(schedule).encode())
    for tensor in (*fitted.tensors.values(), windows, held_out):
        digest.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _examples(windows: Tensor, schedule: Schedule) -> list[Tensor]:
    """The piece of a window that each step trains on, [T]: a matter of the seed alone, so training can go on anywhere."""
    generator = torch.Generator().manual_seed(schedule.seed)
    length = min(TOKENS, windows.shape[1])
    chosen = torch.randint(len(windows), (schedule.steps,), generator=generator)
    starts = torch.randint(windows.shape[1] - length + 1, (schedule.steps,), generator=generator)
    return [windows[i, start : start + length] for i, start in zip(chosen, starts, strict=True)]


def _judge(state: _State, kl: float, codec: TrainableCodec, step: int) -> None:
    state.step, state.in_vain = step, state.in_vain + 1
    # In this form a divergence that is not a number is in vain as well.
    if kl < state.best_kl:
        state.best, state.best_kl, state.in_vain = _copy(codec), kl, 0


def _copy(codec: TrainableCodec) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in codec.state_dict().items()}


def _keep(file: Path, key: str, codec: TrainableCodec, optimizer: torch.optim.Adam, state: _State) -> None:
    tensors = {f"best.{name}": tensor for name, tensor in state.best.items()}
    for name, parameter in codec.named_parameters():
        moments = optimizer.state[parameter]
        tensors |= {f"now.{name}": parameter.detach()}
        tensors |= {f"{moment}.{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
    progress = {"step": state.step, "in_vain": state.in_vain, "best_kl": state.best_kl}
    save_tensors(tensors, file, {"key": key, "progress": json.dumps(progress)})


def _resume(file: Path, key: str, codec: TrainableCodec, optimizer: torch.optim.Adam) -> _State | None:
    """Put `codec` and `optimizer` where they were; None where `file` is missing or another training's."""
    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, "pt", device=str(next(codec.parameters()).device)) as opened:
            metadata = opened.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError:
        # Not written by us, or cut off by a full disk: training starts again.
        return None
    progress = json.loads(metadata["progress"])
    for name, parameter in codec.named_parameters():
        parameter.data.copy_(tensors[f"now.{name}"])
        moments = {moment: tensors[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(progress["step"])), **moments}
    best = {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")}
    return _State(best, **progress)

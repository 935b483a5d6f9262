"""FIM metrics while a model trains: of attention, every so many steps, on the same few windows of text.

For the Hugging Face Trainer::

    Trainer(..., callbacks=[FimCallback(windows, every=500)])

and for a loop of one's own::

    follow = FimFollower(windows, every=500, log=wandb.log)
    for step in range(steps):
        ...
        follow(model, step)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from calibration.fim.attention import attention_spectra, by_head
from calibration.fim.runs import Run, make_run, named
from calibration.fim.scores import run_scores

Log = Callable[[dict[str, float]], Any]


class FimFollower:
    """Measures a model every `every` steps.

    Attributes:
        windows: token ids [W, T] to measure on; T up to 512 keeps a measurement within seconds for small models.
        every: steps between measurements; the first is at step 0.
        log: called with the metrics, named as in W&B (``fisher/layer3/head5/trace``, ``fim/efficiency_score``).
        history: (step, metrics of that step).

    """

    def __init__(self, windows: Tensor, every: int, log: Log | None = None) -> None:
        self.windows = windows
        self.every = every
        self.log = log
        self.history: list[tuple[int, Run]] = []

    def __call__(self, model: PreTrainedModel, step: int) -> Run | None:
        """Measure if it is time to; the model is left in the mode, and with the attention, it came with."""
        if step % self.every:
            return None
        run = measure(model, self.windows, f"step {step}")
        self.history.append((step, run))
        if self.log:
            self.log(run.metrics | run_scores(run))
        return run


def measure(model: PreTrainedModel, windows: Tensor, name: str) -> Run:
    """Metrics of attention of `model` on token ids [W, T]."""
    training = model.training
    model.eval()
    try:
        heads = by_head(attention_spectra(model, windows, lambda: None))
    finally:
        model.train(training)
    return make_run(name, named(heads), {})


class FimCallback(TrainerCallback):
    """The same for `transformers.Trainer`, with the scores in its log history as well (``trainer_state.json``)."""

    def __init__(self, windows: Tensor, every: int, log: Log | None = None) -> None:
        self.follower = FimFollower(windows, every, log)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        self.on_step_end(args, state, control, **context)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        run = self.follower(_unwrapped(context["model"]), state.global_step)
        if run:
            state.log_history.append({"step": state.global_step, **run_scores(run)})


def _unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The model inside what data-parallel training wraps it in."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, PreTrainedModel)
    return inner

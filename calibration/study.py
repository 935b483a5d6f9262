"""A model, measured on text: what plans, codecs and artifacts are made from."""

import datetime
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibration.fim.attention import CONTEXT as FIM_CONTEXT
from calibration.fim.attention import WINDOWS as FIM_WINDOWS
from calibration.fim.attention import attention_spectra, by_head
from calibration.fim.runs import read_runs
from calibration.fit import FitByHead, FittedCodec
from calibration.models import Source, fast_dtype, load_model, rotary_of, short_name, window_length
from calibration.plan import Plan
from calibration.planners import Evidence, check_files
from calibration.planners.budget import budget_for_bits, budget_range
from calibration.planners.tiers import Metrics
from calibration.progress import console, steps
from calibration.recipe import CalibrationConfig
from calibration.statistics import Statistics, collect, fingerprint, load_statistics, save_statistics
from calibration.text import Corpus, calibration_windows, load_corpus, own_text, token_windows
from vllm_kvsplice.artifact import (
    Artifact,
    LayerPlan,
    Manifest,
    ModelShape,
    Provenance,
    RotaryShape,
    make_artifact,
)
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP
from vllm_kvsplice.rotary import Rotary

# Held-out windows behind the quality that an artifact carries; `kvsplice eval` measures more.
QUALITY_WINDOWS = 2
# Others, on which a size is searched for: what was fitted to is no judge.
SEARCH_WINDOWS = 2
# To finetune on, and to judge that by: held-out ones, and one in so many of the others, because few windows hardly tell two
# codecs of 4 bits apart.
TRAINING_WINDOWS, FINETUNE_WINDOWS, JUDGE_EVERY = 96, 2, 12
PACKAGES = ("vllm-kvsplice", "torch", "transformers")


@dataclass(frozen=True)
class HeldOut:
    """Token ids [W, T] of text that was not measured, for different judges: what chose a size must not judge the choice."""

    quality: Tensor
    search: Tensor
    finetune: Tensor


@dataclass(frozen=True)
class Study:
    """A model that was measured: what plans are made from.

    Attributes:
        source: where the model comes from.
        model: loaded for measurements, not for judging.
        rotary: its rotary embedding, None without.
        corpus: the text.
        windows: token ids [W, T] of the text that was measured, and training those of text to finetune on, none without;
            what the model says itself comes to both.
        held_out: to judge on.
        statistics: the measurements.
        config: the recipe.

    """

    source: Source
    model: PreTrainedModel
    rotary: Rotary | None
    corpus: Corpus
    windows: Tensor
    training: Tensor
    held_out: HeldOut
    statistics: Statistics
    config: CalibrationConfig

    def texts_to_finetune_on(self) -> tuple[Tensor, Tensor]:
        """Token ids [W, T] to train on and to judge that by, among them what the model says itself.

        With another seed than what was measured.
        """
        own = self.corpus.own(TRAINING_WINDOWS)
        windows = _with_own_text(self.model, self.training, own, self.config.seed + 1)
        judging = torch.arange(len(windows)) % JUDGE_EVERY == 0
        return windows[~judging], torch.cat((self.held_out.finetune, windows[judging]))

    @property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.model.config)

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's numbers of the layers that are compressed."""
        return self.statistics.layers

    @property
    def dense_layers(self) -> int:
        return self.shape.num_layers - len(self.layers)

    @property
    def dense_bytes(self) -> int:
        """Of a token in the layers that are not compressed, in 16 bits."""
        return self.dense_layers * self.shape.dense_layer_bytes

    @cached_property
    def fit(self) -> FitByHead:
        """Transforms and codebooks."""
        with console.status("Fitting transforms and codebooks"):
            return FitByHead(self.statistics, self.config.fit)

    @cached_property
    def evidence(self) -> Evidence:
        return Evidence(self.fit.distortion, self.layers, lambda: self.attention_metrics)

    def sizes(self, bits: Iterable[float]) -> list[tuple[float, int]]:
        """Of `bits` per element those that this model's pages can have, each with its `budget_for`."""
        least, most = budget_range(self.evidence.distortion)
        return [(each, budget) for each in bits if least <= (budget := self.budget_for(each)) <= most]

    def budget_for(self, bits: float) -> int:
        """Bytes per token of the compressed layers at `bits` per element."""
        return budget_for_bits(bits, self.evidence.distortion[..., 0].numel())

    def artifact(self, plan: Plan) -> Artifact:
        """The model's artifact under `plan`, neither finetuned nor judged."""
        return self.artifact_of(self.fit.codec(plan))

    def artifact_of(self, fitted: FittedCodec) -> Artifact:
        """The model's artifact with a codec that was fitted, not judged yet."""
        rotary, plan = self.rotary, fitted.plan
        return make_artifact(
            Manifest(
                model=self.shape,
                rotary=_shape(rotary) if rotary else None,
                layers=_layer_plans(plan, self.layers, self.shape.num_layers),
                provenance=_provenance(self, plan),
                quality=None,
                tensors_sha256="0" * 64,
            ),
            fitted.tensors | ({"rotary.inv_freq": rotary.inv_freq} if rotary else {}),
        )

    @cached_property
    def attention_metrics(self) -> Metrics:
        """From the recipe's file, or measured on a few short windows."""
        if self.config.fim:
            return read_runs(self.config.fim)[0].heads()
        return by_head(self.attention_spectra)

    @cached_property
    def attention_spectra(self) -> dict[int, Tensor]:
        """Eigenvalues of every layer's attention Fisher matrices, [query heads, T], on a few short windows."""
        length = min(FIM_CONTEXT, self.windows.shape[1])
        # The beginnings of all windows, then what follows them where there are few.
        windows = self.windows.unfold(1, length, length).transpose(0, 1).flatten(0, 1)[:FIM_WINDOWS]
        with steps("Measuring the Fisher information of attention", len(windows)) as progress:
            return attention_spectra(self.model, windows, progress)


def study(source: Source, config: CalibrationConfig, statistics_file: Path | None = None) -> Study:
    """Measure a model as `config` says.

    Args:
        source: directory or Hub name of a Hugging Face causal LM, or one in memory with its tokenizer.
        config: what to measure on.
        statistics_file: measurements are kept here, and used from here when they fit model, text and seed.

    Raises:
        KVSpliceError: a mistake of the user's; the message names the way out.

    """
    check_files(config)
    corpus = load_corpus(config.text)
    model, tokenizer = load_model(source, fast_dtype())
    shape = ModelShape.of(model.config)
    if shape.head_dim % GROUP:
        raise KVSpliceError(f"head size {shape.head_dim} is not a multiple of {GROUP} and cannot be compressed")
    context = window_length(model, config.context)
    rotary = rotary_of(model)
    count = max(1, config.tokens // context)
    windows = calibration_windows(tokenizer, corpus.fit, count - corpus.own(count), context)
    training = windows[:0]
    if config.finetune:
        training = calibration_windows(tokenizer, corpus.fit, TRAINING_WINDOWS - corpus.own(TRAINING_WINDOWS), context)
    held_out = _held_out(tokenizer, corpus.held_out, config, context)
    statistics = _measure(model, windows, corpus.own(count), rotary, config, statistics_file)
    if config.recent and len(statistics.layers) < shape.num_layers:
        raise KVSpliceError(
            "this model has sliding-window layers, beside which a server has no exact window; leave recent out"
        )
    return Study(source, model, rotary, corpus, windows, training, held_out, statistics, config)


def _held_out(tokenizer: PreTrainedTokenizerBase, text: str, config: CalibrationConfig, context: int) -> HeldOut:
    search = SEARCH_WINDOWS if config.max_ppl_increase is not None else 0
    finetuning = FINETUNE_WINDOWS if config.finetune else 0
    needed = QUALITY_WINDOWS + search + finetuning
    try:
        windows = token_windows(tokenizer, text, QUALITY_WINDOWS + SEARCH_WINDOWS + FINETUNE_WINDOWS, context)
    except KVSpliceError as error:
        raise KVSpliceError(f"of what is held out to judge on, {error}") from error
    if len(windows) < needed > QUALITY_WINDOWS:
        raise KVSpliceError(
            f"the text has {len(windows)} held-out windows of {context} tokens, and {needed} are needed to search or "
            "finetune; give more text or a lower --context"
        )
    # Every third window first: each kind comes from all over the text, and quality always from the same places.
    ordered = windows[sorted(range(len(windows)), key=lambda index: index % 3)]
    others = ordered[QUALITY_WINDOWS:needed]
    return HeldOut(ordered[:QUALITY_WINDOWS], others[:search], others[search:])


def _measure(
    model: PreTrainedModel,
    windows: Tensor,
    own: int,
    rotary: Rotary | None,
    config: CalibrationConfig,
    file: Path | None,
) -> Statistics:
    key = fingerprint(model, windows, own, config.seed, config.recent) if file else ""
    kept = load_statistics(file, key) if file else None
    if kept:
        console.print(f"Using the measurements in {file}")
        return kept
    windows = _with_own_text(model, windows, own, config.seed)
    with steps("Measuring keys, values and Fisher information", len(windows)) as progress:
        statistics = collect(model, windows, rotary, recent=config.recent, seed=config.seed, progress=progress)
    if file:
        save_statistics(statistics, file, key)
    return statistics


def _with_own_text(model: PreTrainedModel, windows: Tensor, count: int, seed: int) -> Tensor:
    """`windows` [W, T] and `count` more that the model says."""
    if not count:
        return windows
    with console.status("Listening to what the model says"):
        return torch.cat((windows, own_text(model, count, windows.shape[1], seed)))


def _shape(rotary: Rotary) -> RotaryShape:
    return RotaryShape(pairs=len(rotary.inv_freq), interleaved=rotary.interleaved, skips=rotary.skips)


def _layer_plans(plan: Plan, layers: tuple[int, ...], num_layers: int) -> tuple[LayerPlan | None, ...]:
    rows = {
        layer: LayerPlan(key=_nested(plan.widths[0, row]), value=_nested(plan.widths[1, row]))
        for row, layer in enumerate(layers)
    }
    return tuple(rows.get(layer) for layer in range(num_layers))


def _nested(widths: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in widths.tolist())


def _provenance(measured: Study, plan: Plan) -> Provenance:
    return Provenance(
        model=short_name(measured.source),
        text=measured.corpus.name,
        text_sha256=measured.corpus.sha256,
        tokens=measured.statistics.tokens,
        context=measured.windows.shape[1],
        recent=measured.config.recent,
        seed=measured.config.seed,
        fit=_fitted_by(measured.config, plan),
        planner=plan.planner,
        requested=measured.config.requested,
        expected_change_percent=100 * plan.expected_increase,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )


def _fitted_by(config: CalibrationConfig, plan: Plan) -> str:
    """Algorithms, that of the recipe first, and training, as an artifact tells of them."""
    named = {name or config.fit for heads in plan.fits or ((None,),) for name in heads}
    algorithms = " and ".join(sorted(named, key=lambda name: (name != config.fit, name)))
    return algorithms + (f", finetuned in {config.training_steps} steps" if config.finetune else "")

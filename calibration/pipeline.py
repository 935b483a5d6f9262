"""The steps of calibration in order: collect -> plan -> fit -> evaluate -> export."""

import datetime
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibration.attention import AS_STORED, Reading
from calibration.evaluate import Evaluation, Mode, evaluate
from calibration.fim.attention import CONTEXT as FIM_CONTEXT
from calibration.fim.attention import WINDOWS as FIM_WINDOWS
from calibration.fim.attention import attention_spectra, by_head
from calibration.fim.runs import read_runs
from calibration.fit import FitByHead, FittedCodec
from calibration.fit.errors import error_table, head_errors
from calibration.fit.finetune import Schedule, finetune
from calibration.models import Source, fast_dtype, load_model, longest_context, rotary_of
from calibration.plan import Plan, budget_for_bits, plan_budget
from calibration.planners import Evidence, make_plan
from calibration.planners.files import PlanFile, describe
from calibration.planners.search import CURVE_BITS, search_bits
from calibration.planners.tiers import Metrics
from calibration.recipe import CalibrationConfig
from calibration.statistics import Statistics, collect, fingerprint, load_statistics, save_statistics
from calibration.text import Corpus, calibration_windows, load_corpus, own_text, token_windows
from vllm_kvsplice.artifact import (
    Artifact,
    LayerPlan,
    Manifest,
    ModelShape,
    Provenance,
    Quality,
    RotaryShape,
    make_artifact,
    save_artifact,
)
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP
from vllm_kvsplice.rotary import Rotary

# Held-out windows behind the quality that an artifact carries; `kvsplice eval` measures more.
QUALITY_WINDOWS = 2
# Others, on which a size is searched for: what was fitted to is no judge.
SEARCH_WINDOWS = 2
# Of the tokens to measure and to finetune on, those that the model says by itself (DECISIONS.md).
OWN_SHARE = 3 / 8
# To finetune on, and to judge that by.
TRAINING_WINDOWS, FINETUNE_WINDOWS = 96, 2
DEFAULT_CONTEXT = 1024
PACKAGES = ("vllm-kvsplice", "torch", "transformers")

console = Console(stderr=True)


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
        windows: token ids [W, T] of the text that was measured, and training those to finetune on, none without; text
            that the model says itself comes to both.
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

    @cached_property
    def fit(self) -> FitByHead:
        """Transforms and codebooks."""
        with console.status("Fitting transforms and codebooks"):
            return FitByHead(self.statistics, self.config.fit)

    @cached_property
    def evidence(self) -> Evidence:
        return Evidence(self.fit.distortion, self.layers, lambda: self.attention_metrics)

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
                rotary=RotaryShape(pairs=len(rotary.inv_freq), interleaved=rotary.interleaved) if rotary else None,
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
        windows = self.windows[:FIM_WINDOWS, :FIM_CONTEXT]
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
    corpus = load_corpus(config.text)
    model, tokenizer = load_model(source, fast_dtype())
    shape = ModelShape.of(model.config)
    if shape.head_dim % GROUP:
        raise KVSpliceError(f"head size {shape.head_dim} is not a multiple of {GROUP} and cannot be compressed")
    longest = longest_context(model)
    context = config.context or min(DEFAULT_CONTEXT, longest)
    if context > longest:
        raise KVSpliceError(f"windows of {context} tokens exceed the {longest} the model reads; lower --context")
    rotary = rotary_of(model)
    count = max(1, config.tokens // context)
    windows = calibration_windows(tokenizer, corpus.fit, count - _own(count), context)
    training = windows[:0]
    if config.finetune:
        training = calibration_windows(tokenizer, corpus.fit, TRAINING_WINDOWS - _own(TRAINING_WINDOWS), context)
    held_out = _held_out(tokenizer, corpus.held_out, config, context)
    statistics = _measure(model, windows, _own(count), rotary, config.seed, statistics_file)
    return Study(source, model, rotary, corpus, windows, training, held_out, statistics, config)


def _own(count: int) -> int:
    """How many of `count` windows the model says itself."""
    return int(count * OWN_SHARE)


def _held_out(tokenizer: PreTrainedTokenizerBase, text: str, config: CalibrationConfig, context: int) -> HeldOut:
    sizes = (
        QUALITY_WINDOWS,
        SEARCH_WINDOWS if config.max_ppl_increase is not None else 0,
        FINETUNE_WINDOWS if config.finetune else 0,
    )
    windows = token_windows(tokenizer, text, sum(sizes), context)
    if len(windows) < sum(sizes) > QUALITY_WINDOWS:
        raise KVSpliceError(
            f"the text has {len(windows)} held-out windows of {context} tokens, and {sum(sizes)} are needed to search or "
            "finetune; give more text or a lower --context"
        )
    quality, search, finetuning = windows[: sizes[0]], windows[sizes[0] :][: sizes[1]], windows[sizes[0] + sizes[1] :]
    return HeldOut(quality, search, finetuning)


def choose(measured: Study) -> Plan:
    """The plan that the recipe asks for; dense layers have no part in it, except that a byte budget pays for them first."""
    config = measured.config
    if config.max_ppl_increase is not None:
        return _cheapest(measured, config.max_ppl_increase / 100)
    budget = measured.budget_for(config.bits) if config.bits is not None else config.budget
    if config.budget is not None:
        shape = measured.shape
        budget = config.budget - measured.dense_layers * 4 * shape.num_kv_heads * shape.head_dim
    return make_plan(measured.evidence, config, budget)


def _cheapest(measured: Study, limit: float) -> Plan:
    """The smallest plan under which perplexity grows by at most `limit`, both as expected and as measured.

    A few windows of text are a noisy judge, and the expectation is a good one where limits usually are (docs/planning.md).
    """

    def plan(bits: float) -> Plan:
        return make_plan(measured.evidence, measured.config, measured.budget_for(bits))

    def increase(bits: float) -> float:
        tried = plan(bits)
        evaluation = judge(
            measured.source, measured.artifact(tried), measured.held_out.search, "all", f"Trying {bits:.3f} bits"
        )
        expected = 100 * tried.expected_increase
        console.print(f"Perplexity: expected {expected:+.2f} %, measured {evaluation.change_percent:+.2f} %")
        return max(expected, evaluation.change_percent) / 100

    return plan(search_bits(increase, limit))


def plan(source: Source, config: CalibrationConfig, statistics_file: Path | None = None) -> PlanFile:
    """Measure a model and plan, without judging or writing anything; arguments and errors as of `study`."""
    measured = study(source, config, statistics_file)
    return described(measured, choose(measured))


def described(measured: Study, chosen: Plan) -> PlanFile:
    """`chosen` with what to expect of it and of other sizes."""
    dense = measured.dense_layers * 4 * measured.shape.num_kv_heads * measured.shape.head_dim
    plans = [plan_budget(measured.evidence.distortion, measured.budget_for(bits)) for bits in CURVE_BITS]
    curve = [(p.bytes_per_token + dense, p.expected_increase) for p in plans]
    return describe(chosen, measured.layers, short_name(measured.source), measured.dense_layers, curve)


def calibrate(
    source: Source,
    out: Path,
    config: CalibrationConfig,
    statistics_file: Path | None = None,
    errors_file: Path | None = None,
) -> Artifact:
    """Calibrate a model, write its artifact to `out`, replacing one that is there, and return it.

    Args:
        source, config, statistics_file: as of `study`, as are errors raised.
        out: directory of the artifact.
        errors_file: where to write the errors of every head before and after training, as CSV.

    """
    checkpoint = out.absolute().with_name(f".{out.name}.training")
    return save_artifact(make(source, config, statistics_file, errors_file, checkpoint), out)


def make(
    source: Source,
    config: CalibrationConfig,
    statistics_file: Path | None = None,
    errors_file: Path | None = None,
    checkpoint: Path | None = None,
) -> Artifact:
    """The same without writing the artifact; finetuning that was interrupted goes on from `checkpoint`."""
    measured = study(source, config, statistics_file)
    chosen = choose(measured)
    with console.status("Fitting the codec of the plan"):
        fitted = measured.fit.codec(chosen)
    if config.finetune:
        fitted = _finetune(measured, fitted, checkpoint)
    artifact = measured.artifact_of(fitted)
    _report_errors(measured, artifact, chosen, errors_file)
    return artifact.with_quality(_judge(source, artifact, measured.held_out.quality))


def _report_errors(measured: Study, artifact: Artifact, chosen: Plan, file: Path | None) -> None:
    """Print what coding does to keys and values before and after training, and write it to `file`."""
    start = measured.artifact_of(measured.fit.start(chosen))
    untrained = start.manifest.tensors_sha256 == artifact.manifest.tensors_sha256
    after = head_errors(artifact, measured.statistics)
    before = after if untrained else head_errors(start, measured.statistics)
    console.print(error_table(before, after))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        names = ["layer", "head", "kind", "bits"]
        before.merge(after, on=names, suffixes=("_before", "_after")).to_csv(file, index=False)


def _finetune(measured: Study, fitted: FittedCodec, checkpoint: Path | None) -> FittedCodec:
    config = measured.config
    schedule = Schedule(config.training_steps, seed=config.seed)
    # Another seed: not what was measured.
    windows = with_own_text(measured.model, measured.training, _own(TRAINING_WINDOWS), config.seed + 1)
    with steps("Finetuning on what the model says", schedule.steps) as progress:
        result = finetune(
            measured.model,
            fitted,
            measured.layers,
            measured.rotary,
            windows,
            measured.held_out.finetune,
            schedule,
            progress,
            checkpoint,
        )
    console.print(
        f"Divergence from the uncompressed model: {result.kl_before:.4f} -> {result.kl_after:.4f} nats a token"
    )
    return result.codec


@contextmanager
def steps(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error; the callable advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def _measure(
    model: PreTrainedModel, windows: Tensor, own: int, rotary: Rotary | None, seed: int, file: Path | None
) -> Statistics:
    key = fingerprint(model, windows, own, seed) if file else ""
    kept = load_statistics(file, key) if file else None
    if kept:
        console.print(f"Using the measurements in {file}")
        return kept
    windows = with_own_text(model, windows, own, seed)
    with steps("Measuring keys, values and Fisher information", len(windows)) as progress:
        statistics = collect(model, windows, rotary, seed=seed, progress=progress)
    if file:
        save_statistics(statistics, file, key)
    return statistics


def with_own_text(model: PreTrainedModel, windows: Tensor, count: int, seed: int) -> Tensor:
    """`windows` [W, T] and `count` more that the model says."""
    if not count:
        return windows
    with console.status("Listening to what the model says"):
        return torch.cat((windows, own_text(model, count, windows.shape[1], seed)))


def _layer_plans(plan: Plan, layers: tuple[int, ...], num_layers: int) -> tuple[LayerPlan | None, ...]:
    rows = {
        layer: LayerPlan(key=_nested(plan.widths[0, row]), value=_nested(plan.widths[1, row]))
        for row, layer in enumerate(layers)
    }
    return tuple(rows.get(layer) for layer in range(num_layers))


def _nested(widths: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in widths.tolist())


def short_name(source: Source) -> str:
    """A path on the machine that calibrated means nothing elsewhere."""
    model = source if isinstance(source, str) else source[0].name_or_path or type(source[0]).__name__
    return Path(model).name if Path(model).exists() else model


def _provenance(measured: Study, plan: Plan) -> Provenance:
    return Provenance(
        model=short_name(measured.source),
        text=measured.corpus.name,
        text_sha256=measured.corpus.sha256,
        tokens=measured.statistics.tokens,
        context=measured.windows.shape[1],
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
    return f"{algorithms}, finetuned in {config.training_steps} steps" if config.finetune else algorithms


def _judge(source: Source, artifact: Artifact, windows: Tensor) -> Quality:
    """Perplexity on held-out text, in float32 because it is a quality figure and not a statistic."""
    evaluation = judge(source, artifact, windows, "all", "Judging the codec on held-out text")
    return Quality(
        mode="all",
        baseline_ppl=evaluation.baseline_ppl,
        ppl=evaluation.ppl,
        change_percent=evaluation.change_percent,
        tokens=evaluation.tokens,
        context=windows.shape[1],
    )


def judge(
    source: Source,
    artifact: Artifact,
    windows: Tensor,
    mode: Mode,
    description: str,
    reading: Reading = AS_STORED,
) -> Evaluation:
    """Evaluate `artifact` on token ids [W, T] with a progress bar; raises `ArtifactError` if it is another model's."""
    model, _ = load_model(source, torch.float32)
    artifact.check_model(model.config)
    codecs = {index: codec.to(model.device) for index, codec in artifact.codecs.items()}
    with steps(description, len(windows)) as progress:
        return evaluate(model, codecs, windows, mode, progress, reading)

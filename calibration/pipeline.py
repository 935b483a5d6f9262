"""The steps of calibration in order: collect -> plan -> fit (-> finetune) -> evaluate -> export."""

import math
from pathlib import Path

import torch
from torch import Tensor

from calibration.attention import AS_STORED, Reading
from calibration.evaluate import Evaluation, Mode, compressing_tap, evaluate
from calibration.fit import FittedCodec
from calibration.fit.errors import error_table, head_errors
from calibration.fit.finetune import Schedule, finetune
from calibration.models import Source, load_model, short_name, window_length
from calibration.plan import Plan
from calibration.planners import make_plan
from calibration.planners.budget import budget_range, plan_budget
from calibration.planners.files import PlanFile, describe
from calibration.planners.search import CURVE_BITS, search_bits
from calibration.progress import console, steps
from calibration.recipe import CalibrationConfig
from calibration.study import Study, study
from vllm_kvsplice.artifact import Artifact, Quality, save_artifact
from vllm_kvsplice.errors import KVSpliceError


def choose(measured: Study) -> Plan:
    """The plan that the recipe asks for; dense layers have no part in it, except that a byte budget pays for them first."""
    config = measured.config
    if config.max_ppl_increase is not None:
        return _cheapest(measured, config.max_ppl_increase / 100)
    budget = measured.budget_for(config.bits) if config.bits is not None else config.budget
    if config.budget is not None:
        dense = measured.dense_bytes
        least, most = budget_range(measured.evidence.distortion)
        budget = config.budget - dense
        if dense and not least <= budget <= most:
            raise KVSpliceError(
                f"a budget of {config.budget} bytes per token is outside {least + dense}..{most + dense}, of which layers "
                f"that stay dense take {dense}; choose another --budget"
            )
    return make_plan(measured.evidence, config, budget)


def _cheapest(measured: Study, limit: float) -> Plan:
    """The smallest plan under which perplexity grows by at most `limit`, as measured by its divergence on held-out text.

    On a few windows the growth itself is mostly noise and the divergence is not; on many they are alike (docs/planning.md).
    """

    in_memory = load_model(measured.source, torch.float32)

    def plan(bits: float) -> Plan:
        return make_plan(measured.evidence, measured.config, measured.budget_for(bits))

    def increase(bits: float) -> float:
        tried = measured.artifact(plan(bits))
        reading = Reading(measured.config.recent)
        evaluation = judge(in_memory, tried, measured.held_out.search, "all", f"Trying {bits:.3f} bits", reading)
        grown = math.expm1(evaluation.divergence)
        console.print(
            f"Perplexity: {100 * grown:+.2f} % by divergence, {evaluation.change_percent:+.2f} % on this text"
        )
        return grown

    return plan(search_bits(increase, limit))


def plan(source: Source, config: CalibrationConfig, statistics_file: Path | None = None) -> PlanFile:
    """Measure a model and plan, without judging or writing anything; arguments and errors as of `study`."""
    measured = study(source, config, statistics_file)
    return described(measured, choose(measured))


def described(measured: Study, chosen: Plan) -> PlanFile:
    """`chosen` with what to expect of it and of other sizes."""
    plans = [plan_budget(measured.evidence.distortion, budget) for _, budget in measured.sizes(CURVE_BITS)]
    curve = [(p.bytes_per_token + measured.dense_bytes, p.expected_increase) for p in plans]
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
    _report_errors(measured, artifact, fitted.plan, errors_file)
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
    windows, held_out = measured.texts_to_finetune_on()
    schedule = Schedule(config.training_steps, seed=config.seed, recent=config.recent)
    with steps("Finetuning on what the model says", schedule.steps) as progress:
        result = finetune(
            measured.model,
            fitted,
            measured.layers,
            measured.rotary,
            windows,
            held_out,
            schedule,
            progress,
            checkpoint,
        )
    console.print(
        f"Divergence from the uncompressed model: {result.kl_before:.4f} -> {result.kl_after:.4f} nats a token by training"
    )
    return result.codec


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
    """Evaluate `artifact` on token ids [W, T] with a progress bar.

    Raises:
        KVSpliceError: the artifact is another model's, windows are too long for it, or what it says is not finite.

    """
    model, _ = load_model(source, torch.float32)
    artifact.check_model(model.config)
    window_length(model, windows.shape[1])
    with steps(description, len(windows)) as progress:
        tap = compressing_tap(artifact.codecs_on(model.device), mode)
        found = evaluate(model, tap, windows, progress, reading)
    if not math.isfinite(found.ppl):
        raise KVSpliceError(
            f"the model's perplexity is {found.baseline_ppl}, and {found.ppl} with its cache compressed"
        )
    return found

"""A whole comparison: the model, the text, every peer, and our codecs at sizes from 2 to 8 bits or as given."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from calibration.compare.harness import Row, compare
from calibration.compare.methods import KVSplice, Method
from calibration.compare.peers import PEERS, rank_peers
from calibration.compare.spline_first import spline_first
from calibration.models import load_model, window_length
from calibration.planners.budget import plan_budget
from calibration.progress import steps
from calibration.recipe import CalibrationConfig
from calibration.study import study
from calibration.text import NAMED, read_text, token_windows
from vllm_kvsplice.artifact import Artifact, load_artifact
from vllm_kvsplice.errors import KVSpliceError

OURS = "KVSplice"
ARTIFACTS = f"{OURS}, artifacts"
# Bits per element at which our codecs are planned and fitted from one measurement.
SIZES = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        model: directory or Hub name.
        text: to judge on, as for `calibration.text.read_text`.
        fit: what to fit our codecs and truncated rank on; None: neither.
        artifacts: directories of artifacts that are judged as well.
        windows, context, recent: windows of text, their tokens as of `window_length`, and W of the exact window.
        statistics: measurements are kept here, as in `calibration.study.study`.
        only: judge only methods with this in their name.

    """

    model: str
    text: str
    fit: CalibrationConfig | None
    artifacts: Sequence[Path] = ()
    windows: int = 12
    context: int | None = None
    recent: int = 0
    statistics: Path | None = None
    only: str = ""


def run(settings: Settings) -> Iterator[Row]:
    """Judge everything, one row each as soon as it is known; a progress bar is on standard error.

    Raises:
        KVSpliceError: a mistake of the user's; the message names the way out.

    """
    fit = settings.fit
    if fit and fit.text not in NAMED and Path(fit.text).resolve() == Path(settings.text).resolve():
        raise KVSpliceError(f"{settings.text} is text to fit on and to judge on; give --fit-text another one")
    content = read_text(settings.text)
    folders = [path.name for path in settings.artifacts]
    # `kvsplice` in every model's directory.
    given = [
        (
            path.name if folders.count(path.name) == 1 else f"{path.absolute().parent.name}/{path.name}",
            load_artifact(path),
        )
        for path in settings.artifacts
    ]
    model, tokenizer = load_model(settings.model, torch.float32)
    windows = token_windows(tokenizer, content, settings.windows, window_length(model, settings.context))
    for _, artifact in given:
        artifact.check_model(model.config)
    methods = [*PEERS, *(_fitted(settings, fit, model) if fit else ())]
    methods += [_ours(name, artifact, model, ARTIFACTS) for name, artifact in given]
    names = [method.name for method in methods]
    methods = [method for method in methods if settings.only in method.name]
    if not methods:
        raise KVSpliceError(f"no method has {settings.only!r} in its name; there are: {', '.join(names)}")
    with steps(f"Judging {len(methods)} methods", (1 + len(methods)) * len(windows)) as progress:
        yield from compare(model, methods, windows, settings.recent, progress)


def _fitted(settings: Settings, fit: CalibrationConfig, model: PreTrainedModel) -> Iterator[Method]:
    """Truncated rank and our codecs, from one measurement of the text to fit on."""
    measured = study(settings.model, fit, settings.statistics)
    with steps("Measuring principal components", len(measured.windows)) as progress:
        yield from rank_peers(measured.model, measured.windows, progress)
    for bits, budget in measured.sizes(SIZES):
        plan = plan_budget(measured.evidence.distortion, budget)
        yield _ours(f"{bits:g} bits", measured.artifact(plan), model)
    for bits in (3.0, 4.0):
        yield spline_first(measured, bits)


def _ours(name: str, artifact: Artifact, model: PreTrainedModel, family: str = OURS) -> KVSplice:
    return KVSplice(f"{OURS} {name}", family, artifact.codecs_on(model.device))

"""All FIM metrics of a model on a text, as one `calibration.fim.runs.Run`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from calibration.fim import spectrum
from calibration.fim.attention import WINDOWS, by_head
from calibration.fim.linear import map_metrics
from calibration.fim.runs import PREFIX, Run, make_run, named
from calibration.fit.transform import residual_covariance
from calibration.models import short_name
from calibration.progress import steps
from calibration.statistics import KindStatistics
from calibration.study import Study

# Of attention's spectra, whose tails say little; those of keys and values are kept whole.
KEPT_EIGENVALUES = 64


def fim_run(measured: Study, name: str) -> Run:
    """Metrics of attention per query head, of keys and values per KV head, and of the maps that make them."""
    metrics, spectra = _of_attention(measured)
    for kind, statistics in (("key", measured.statistics.key), ("value", measured.statistics.value)):
        for place, values, eigenvalues in _kind_metrics(statistics, measured.layers):
            metrics |= {f"{place}/{kind}_{metric}": value for metric, value in values.items()}
            spectra[f"{place}/{kind}_spectrum"] = eigenvalues
    metrics |= _of_maps(measured)
    return make_run(name, metrics, spectra, **_origin(measured))


def _origin(measured: Study) -> dict[str, str | int]:
    """What a run says of itself."""
    shape = measured.shape
    return {
        "model": short_name(measured.source),
        "text": measured.corpus.name,
        "tokens": measured.statistics.tokens,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
    }


def _of_attention(measured: Study) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics, and the largest eigenvalues, of every query head."""
    spectra = {
        f"{PREFIX}layer{layer}/head{head}/spectrum": _rounded(values[:KEPT_EIGENVALUES])
        for layer, heads in measured.attention_spectra.items()
        for head, values in enumerate(heads)
    }
    return named(by_head(measured.attention_spectra)), spectra


def _of_maps(measured: Study) -> dict[str, float]:
    """Metrics of the maps inside attention, and their means over all of them."""
    windows = measured.windows[:WINDOWS]
    with steps("Measuring weights and activations", len(windows)) as progress:
        maps = map_metrics(measured.model, windows, progress)
    means = {}
    for summary in ("weight_df", "activation_df", "weight_compression", "activation_compression"):
        found = [value for metric, value in maps.items() if metric.endswith(f"_{summary}")]
        # There are none where attention is made of something else than linear maps.
        if found:
            means[f"{PREFIX}{summary}_global_mean"] = sum(found) / len(found)
    return means | {PREFIX + metric: value for metric, value in maps.items()}


def _kind_metrics(
    statistics: KindStatistics, layers: tuple[int, ...]
) -> Iterator[tuple[str, dict[str, float], list[float]]]:
    """(place, metrics, eigenvalues of the Fisher matrix) of every KV head; the metrics include residuals' variance."""
    covariances = residual_covariance(statistics.residual, torch.ones_like(statistics.weight))
    for row, layer in enumerate(layers):
        eigenvalues = spectrum.eigenvalues(statistics.fisher[row])
        fisher = spectrum.metrics(eigenvalues, eigenvalues[..., :1] * spectrum.RESOLVED)
        variances = spectrum.eigenvalues(covariances[row])
        activation = {f"activation_{m}": v for m, v in spectrum.variance_metrics(variances).items()}
        for head in range(len(eigenvalues)):
            values = {metric: float(value[head]) for metric, value in (fisher | activation).items()}
            yield f"{PREFIX}layer{layer}/kvhead{head}", values, _rounded(eigenvalues[head])


def _rounded(values: Tensor) -> list[float]:
    """Six digits, which is more than anybody reads off a spectrum."""
    return [float(f"{value:.6g}") for value in values.to(torch.float64).tolist()]

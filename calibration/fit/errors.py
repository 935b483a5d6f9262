"""What coding does to the sampled keys and values of every head: a fit gone wrong shows here before any model is run."""

import numpy
import pandas
import torch
from rich.table import Table
from torch import Tensor

from calibration.statistics import KindStatistics, Statistics
from vllm_kvsplice.artifact import Artifact
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.rotary import Rotary

# Of the samples, evenly spread.
_SAMPLES = 512
# What heads that say nothing are divided by.
_SILENT = 1e-30


def head_errors(artifact: Artifact, statistics: Statistics) -> pandas.DataFrame:
    """A row for each kind and head of each compressed layer of `artifact`.

    Columns: `layer`, `head`, `kind`, `bits` per element, `relative_error` ||x' - x|| / ||x|| of keys or values x, and
    `explained_variance`, the share of the residual's energy that is read back.

    Raises:
        KVSpliceError: an error is not finite.

    """
    chosen = torch.linspace(0, len(statistics.positions) - 1, _SAMPLES).long().unique()
    positions = statistics.positions[chosen]
    rows = []
    for row, (layer, codec) in enumerate(artifact.codecs.items()):
        residuals = [kind.residual[row][:, chosen].float() for kind in (statistics.key, statistics.value)]
        offsets = (
            _offset(statistics.key, row, positions, codec.rotary),
            _offset(statistics.value, row, positions, None),
        )
        exact = [u + offset for u, offset in zip(residuals, offsets, strict=True)]
        read = codec.reconstruct(exact[0].transpose(0, 1), exact[1].transpose(0, 1), positions)
        for kind, x, u, back in zip(("key", "value"), exact, residuals, read, strict=True):
            lost = _energy(back.transpose(0, 1) - x)
            rows.append(
                pandas.DataFrame(
                    {
                        "layer": layer,
                        "head": range(len(lost)),
                        "kind": kind,
                        "bits": [sum(w) / len(w) for w in getattr(artifact.manifest.layers[layer], kind)],
                        "relative_error": (lost / _energy(x).clamp_min(_SILENT)).sqrt(),
                        "explained_variance": 1 - lost / _energy(u).clamp_min(_SILENT),
                    }
                )
            )
    errors = pandas.concat(rows, ignore_index=True)
    if not numpy.isfinite(errors["relative_error"]).all():
        raise KVSpliceError("the fitted codec gives back numbers that are not finite; try --fit pca, or fewer --steps")
    return errors


def error_table(before: pandas.DataFrame, after: pandas.DataFrame) -> Table:
    """Both of `head_errors`, before and after training: of all heads on average, and of the one that reads back least."""
    table = Table("reading back", "relative error", "explained variance", "of the worst head", title_justify="left")
    for kind in ("key", "value"):
        was, now = (errors[errors["kind"] == kind] for errors in (before, after))
        worst = now.loc[now["explained_variance"].idxmin()]
        table.add_row(
            f"{kind}s",
            f"{was['relative_error'].mean():.3f} -> {now['relative_error'].mean():.3f}",
            f"{was['explained_variance'].mean():.3f} -> {now['explained_variance'].mean():.3f}",
            f"{was.loc[worst.name, 'explained_variance']:.3f} -> {worst['explained_variance']:.3f} "
            f"(layer {worst['layer']}, head {worst['head']}, {worst['bits']:.2f} bits)",
        )
    return table


def _offset(kind: KindStatistics, row: int, positions: Tensor, rotary: Rotary | None) -> Tensor:
    mean = kind.mean[row][:, None].expand(-1, len(positions), -1)
    return rotary.rotate(mean, positions) if rotary else mean


def _energy(x: Tensor) -> Tensor:
    return x.square().sum((1, 2))

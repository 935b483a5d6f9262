"""What the eigenvalues of a Fisher matrix, or of a covariance, say in single numbers."""

import torch
from torch import Tensor

# Eigenvalues below are taken for zero: they only ever divide. The published thresholds of `cond` rest on this floor; in the
# examples that go with them cond is eigmax / 1e-8 to three digits (docs/planning.md).
POSITIVE = 1e-8
# The same for matrices whose scale is their own, as a share of the largest: what float32 sums resolve.
RESOLVED = 1e-7
# Share of the energy that the effective rank must hold.
EFFECTIVE = 0.9
VARIANCES = (90, 95, 99)


def eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues [..., n] of symmetric positive semidefinite `matrices` [..., n, n], largest first, in float64."""
    return torch.linalg.eigvalsh(matrices.double()).flip(-1).clamp_min(0)


def metrics(spectra: Tensor, floor: float | Tensor = POSITIVE) -> dict[str, Tensor]:
    """Metrics [...] of `spectra` [..., n] of n eigenvalues each, largest first.

    trace: their sum. eigmax: the largest. cond: eigmax / the smallest that is positive (at least `floor`).
    energy_r8, energy_r16: share of the largest 8 and 16 in the trace. effective_rank: fewest that hold 90 % of it.
    df: (sum)^2 / sum of squares, the number of equal eigenvalues that would spread as much.
    """
    spectra = spectra.double()
    trace, largest = spectra.sum(-1), spectra[..., 0]
    smallest = spectra.masked_fill(spectra < floor, torch.inf).amin(-1)
    energy = spectra.cumsum(-1) / trace.clamp_min(1e-300)[..., None]
    return {
        "trace": trace,
        "eigmax": largest,
        # A spectrum of zeros is as even as a spectrum can be.
        "cond": torch.where(smallest.isfinite(), largest / smallest, torch.ones_like(largest)),
        "energy_r8": energy[..., min(8, spectra.shape[-1]) - 1],
        "energy_r16": energy[..., min(16, spectra.shape[-1]) - 1],
        "effective_rank": rank_for(spectra, EFFECTIVE),
        "df": degrees_of_freedom(spectra),
    }


def degrees_of_freedom(spectra: Tensor) -> Tensor:
    """(sum)^2 / sum of squares of `spectra` [..., n]; 0 for zeros."""
    spectra = spectra.double()
    return spectra.sum(-1) ** 2 / spectra.square().sum(-1).clamp_min(1e-300)


def rank_for(spectra: Tensor, share: float) -> Tensor:
    """The fewest eigenvalues, largest first, that hold `share` of the sum of `spectra` [..., n]: int64 [...]."""
    spectra = spectra.double()
    # A sum of rounded shares may miss 1 by a rounding.
    wanted = share * spectra.sum(-1, keepdim=True) * (1 - 1e-12)
    return (spectra.cumsum(-1) < wanted).sum(-1) + 1


def variance_metrics(spectra: Tensor) -> dict[str, Tensor]:
    """Of variances [..., n]: `df`, `k90`, `k95`, `k99` (dimensions that hold so much of it) and `compression`, n / k95."""
    ranks = {f"k{percent}": rank_for(spectra, percent / 100) for percent in VARIANCES}
    return {"df": degrees_of_freedom(spectra), **ranks, "compression": spectra.shape[-1] / ranks["k95"].double()}

"""The transform from residuals to latents: a Fisher-weighted Karhunen-Loeve transform."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.statistics import KindStatistics, with_floor


@dataclass(frozen=True)
class Transform:
    """Analysis E and synthesis D = E^-1, [L, H, D, D] each, and the weighted variance of each latent, [L, H, D].

    Latent i has unit variance, and an error of variance v in it costs ``importance[i] * v``.
    """

    analysis: Tensor
    synthesis: Tensor
    importance: Tensor


def weighted_klt(statistics: KindStatistics) -> Transform:
    """The transform that decorrelates latents in the metric of the Fisher matrix.

    With A the square root of the (regularised) Fisher matrix and A S A = U diag(e) U^T for covariance S, the latents are
    z = diag(e)^-1/2 U^T A u: uncorrelated, of unit variance, and squared errors in them add up to u's Fisher-weighted
    squared error (the KLT is optimal for a weighted square error: Gray & Neuhoff, Quantization, 1998). Tokens count by
    their weight, so both hold of the tokens that the loss feels.
    """
    covariance = residual_covariance(statistics.residual, statistics.weight)
    eigenvalues, vectors = torch.linalg.eigh(with_floor(statistics.fisher))
    root = (vectors * eigenvalues.sqrt()[..., None, :]) @ vectors.mT
    inverse = (vectors * eigenvalues.rsqrt()[..., None, :]) @ vectors.mT
    variance, basis = torch.linalg.eigh(root @ covariance @ root)
    variance, basis = variance.flip(-1), basis.flip(-1)
    variance = variance.clamp_min(1e-12 * variance[..., :1].clamp_min(1e-30))
    deviation = variance.sqrt()
    analysis = (basis.mT @ root) / deviation[..., None]
    synthesis = (inverse @ basis) * deviation[..., None, :]
    return Transform(analysis.float(), synthesis.float(), variance.float())


def residual_covariance(residual: Tensor, weight: Tensor) -> Tensor:
    """[L, H, D, D] in float64 of samples [L, H, n, D] less their mean, with weights [L, H, n] of 1 on average."""
    layers = zip(residual, weight, strict=True)
    return torch.stack([((x.float() * w[..., None]).mT @ x.float() / x.shape[1]).double() for x, w in layers])

"""Monotone splines as companders: a group's levels are a smooth curve over a uniform grid (docs/codec.md)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.fit.codebooks import companded_levels, moments_of, squared_error

# Knots are evenly spaced on the side of the codes: sixteen pieces over 2 to 256 levels.
_PIECES = 16
_FIT_STEPS, _FIT_RATE = 60, 0.03


@dataclass(frozen=True)
class MonotoneSpline:
    """M strictly increasing rational-quadratic splines through K + 1 knots (Gregory & Delbourgo, 1982).

    In the form of Durkan et al., Neural Spline Flows, 2019, equations 4 and 6 to 8. Arguments lie between the outer knots.

    Attributes:
        x, y: knots, ascending, [M, K + 1].
        slope: positive derivatives there, [M, K + 1].

    """

    x: Tensor
    y: Tensor
    slope: Tensor

    def to(self, device: torch.device) -> "MonotoneSpline":
        return MonotoneSpline(self.x.to(device), self.y.to(device), self.slope.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """Values at `x` [M, n]."""
        x0, x1, y0, y1, d0, d1 = self._pieces(self.x, x)
        s = (y1 - y0) / (x1 - x0)
        at = (x - x0) / (x1 - x0)
        mixed = at * (1 - at)
        return y0 + (y1 - y0) * (s * at**2 + d0 * mixed) / (s + (d1 + d0 - 2 * s) * mixed)

    def inverse(self, y: Tensor) -> Tensor:
        """Where the splines take the values `y` [M, n]."""
        x0, x1, y0, y1, d0, d1 = self._pieces(self.y, y)
        s = (y1 - y0) / (x1 - x0)
        bend = (y - y0) * (d1 + d0 - 2 * s)
        a, b, c = (y1 - y0) * (s - d0) + bend, (y1 - y0) * d0 - bend, s * (y0 - y)
        return x0 + (x1 - x0) * 2 * c / (-b - (b**2 - 4 * a * c).clamp_min(0).sqrt())

    def _pieces(self, knots: Tensor, at: Tensor) -> list[Tensor]:
        """Ends in x and y, and slopes, of the piece that each of `at` [M, n] lies in."""
        piece = torch.searchsorted(knots.detach().contiguous(), at.detach().contiguous()) - 1
        piece = piece.clamp(0, knots.shape[1] - 2)
        return [t.gather(1, piece + end) for t in (self.x, self.y, self.slope) for end in (0, 1)]


def spline_levels(histogram: Tensor, width: int) -> Tensor:
    """Levels [M, 2**width] on a spline, fitted to leave the least squared error, for M histograms [M, bins]."""
    start = companded_levels(histogram, _PIECES + 1)
    first, steps = start[:, :1], start.diff(dim=1).log()
    slopes = (start.diff(dim=1) * _PIECES).log()
    slopes = torch.cat((slopes[:, :1], (slopes[:, 1:] + slopes[:, :-1]) / 2, slopes[:, -1:]), 1)
    parameters = [tensor.requires_grad_() for tensor in (first.clone(), steps, slopes)]
    optimizer = torch.optim.Adam(parameters, lr=_FIT_RATE)
    codes, moments = _grid(histogram, width), moments_of(histogram)
    for _ in range(_FIT_STEPS):
        optimizer.zero_grad()
        error = squared_error(_expander(*parameters)(codes), moments)
        (error / error.detach().clamp_min(1e-30)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return _expander(*parameters)(codes).float()


def _expander(first: Tensor, steps: Tensor, slopes: Tensor) -> MonotoneSpline:
    """From codes in 0..1 to latents; the compander is its inverse."""
    codes = torch.linspace(0, 1, _PIECES + 1, dtype=first.dtype).expand(len(first), -1)
    latents = torch.cat((first, first + steps.exp().cumsum(1)), 1)
    return MonotoneSpline(codes, latents, slopes.exp())


def _grid(histogram: Tensor, width: int) -> Tensor:
    """Middles of 2**width equal cells of 0..1."""
    grid = (torch.arange(1 << width, dtype=histogram.dtype) + 0.5) / (1 << width)
    return grid.expand(len(histogram), -1)

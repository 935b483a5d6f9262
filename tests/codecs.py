"""Random codecs, for tests and for benchmarks on machines that have nothing but torch and Triton."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_kvsplice.codec import LEVELS, KindCodec, LayerCodec
from vllm_kvsplice.layout import GROUP, LayerLayout
from vllm_kvsplice.rotary import Rotary

ALL_WIDTHS = tuple(range(9))

# (share of the dimensions that turn, interleaved pairs); None: keys carry no position.
ROTARIES: dict[str, tuple[float, bool] | None] = {
    "none": None,
    "half": (1.0, False),
    "interleaved": (1.0, True),
    "partial": (0.5, False),
    "partial-interleaved": (0.25, True),
}
# Whether the sinks of even and of odd heads are coded; values do the opposite of keys where the two differ.
SINKS = {"replaced": (False, False), "coded": (True, True), "mixed": (False, True)}


def make_rotary(style: str, dim: int) -> Rotary | None:
    if not (shape := ROTARIES[style]):
        return None
    pairs = int(dim * shape[0]) // 2
    return Rotary(10000.0 ** -(torch.arange(pairs, dtype=torch.float32) / pairs), shape[1])


def make_codec(
    heads: int,
    dim: int,
    widths: Sequence[int] = ALL_WIDTHS,
    rotary: str = "half",
    sinks: str = "mixed",
    seed: int = 0,
    uniform: bool = False,
    falling: bool = False,
) -> LayerCodec:
    """A random codec: orthogonal transforms, Gaussian quantiles as codebooks, each of `widths` as often as the others.

    `uniform`: levels at even distances. `falling`: widths fall from group to group of a head, as in plans.
    """
    random = torch.Generator().manual_seed(seed)
    groups = 2 * heads * dim // GROUP
    drawn = torch.tensor(widths).repeat(-(-groups // len(widths)))[:groups]
    plan = drawn[torch.randperm(groups, generator=random)].view(2, heads, dim // GROUP)
    if falling:
        plan = plan.sort(dim=-1, descending=True).values
    coded = torch.tensor(SINKS[sinks]).repeat(heads)[:heads]
    kinds = [
        _make_kind(plan[0], coded, random, uniform),
        _make_kind(plan[1], ~coded if sinks == "mixed" else coded, random, uniform),
    ]
    layout = LayerLayout(*(tuple(map(tuple, half.tolist())) for half in plan))
    return LayerCodec(*kinds, layout, make_rotary(rotary, dim))


def _make_kind(widths: Tensor, coded: Tensor, random: torch.Generator, even: bool) -> KindCodec:
    heads, dim = widths.shape[0], widths.shape[1] * GROUP

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random)

    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=random)).Q
    levels, unit = (even_levels if even else codebooks)(widths, uniform(*widths.shape, low=0.8, high=1.2))
    deviation = uniform(heads, dim, low=0.7, high=1.4) * unit.repeat_interleave(GROUP, 1)
    used = (widths > 0).repeat_interleave(GROUP, 1)
    return KindCodec(
        mean=torch.randn(heads, dim, generator=random),
        analysis=basis.mT / deviation[..., None] * used[..., None],
        synthesis=basis * (deviation * used)[:, None],
        levels=levels,
        sink=torch.randn(heads, dim, generator=random),
        sink_scale=uniform(heads, dim, low=0.7, high=1.4) * coded[:, None],
    )


def codebooks(widths: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
    """Stretched quantiles of the normal distribution in whole numbers, [..., 256] for widths [...], and the unit [...]."""
    sizes = (1 << widths)[..., None]
    quantiles = torch.special.ndtri((torch.arange(LEVELS).minimum(sizes - 1) + 0.5) / sizes) * stretch[..., None]
    quantiles = torch.where(sizes > 1, quantiles, 0.0)
    # Seven and eight bits leave no choice but to count.
    counted = torch.arange(LEVELS).minimum(sizes - 1) * (LEVELS // sizes) - LEVELS // 2
    unit = torch.where(widths > 6, 8 / 127, (quantiles.abs().amax(-1) / 127).clamp_min(1e-3))
    whole = (quantiles / unit[..., None]).round()
    assert (whole.diff(dim=-1) > 0)[(widths[..., None] <= 6) & (torch.arange(1, LEVELS) < sizes)].all()
    return torch.where(widths[..., None] > 6, counted, whole).float(), unit


def even_levels(widths: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
    """Levels two apart around 0, where there are eight bits one apart, and the unit; shapes as in `codebooks`."""
    sizes = (1 << widths)[..., None]
    code = torch.arange(LEVELS).minimum(sizes - 1)
    levels = torch.where(widths[..., None] < 8, 2 * code + 1 - sizes, code - LEVELS // 2)
    return levels.float() * (sizes > 1), stretch * (2.2 + widths / 4) / (1 << widths)

"""The table of peers. Each follows the paper or source that its store and its method name."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.compare.integers import ChannelIntegers, TokenIntegers
from calibration.compare.methods import Kivi, Method, Peer, Rank, TurboQuant
from calibration.compare.rank import principal_components
from calibration.compare.stores import BFLOAT16, FP8
from calibration.compare.vllm_caches import Int4, LloydMax, Scaled, Uniform

FP8_SCALED, INT8_SCALED = Scaled(torch.float8_e4m3fn), Scaled(torch.int8)
# Tokens of a key group and dimensions of a value group, as in the paper's experiments; its residual is `Kivi`'s default.
KIVI_GROUP = 32

PEERS: tuple[Method, ...] = (
    Peer("bfloat16", "float", BFLOAT16, BFLOAT16),
    Peer("vLLM fp8_e4m3", "float", FP8, FP8),
    Peer("vLLM fp8_per_token_head", "vLLM per token and head", FP8_SCALED, FP8_SCALED),
    Peer("vLLM int8_per_token_head", "vLLM per token and head", INT8_SCALED, INT8_SCALED),
    Peer("vLLM int4_per_token_head", "vLLM per token and head", Int4(), Int4()),
    *(Peer(f"int{b}", "int", TokenIntegers(b), TokenIntegers(b)) for b in (8, 4, 3, 2)),
    *(
        Peer(f"int{b} + Hadamard", "int + Hadamard", TokenIntegers(b, rotated=True), TokenIntegers(b, rotated=True))
        for b in (8, 4, 3, 2)
    ),
    *(Kivi(f"KIVI-{b}", "KIVI", ChannelIntegers(b, KIVI_GROUP), TokenIntegers(b, KIVI_GROUP)) for b in (4, 2)),
    TurboQuant("vLLM turboquant_k8v4", "TurboQuant", FP8, Uniform(4)),
    TurboQuant("vLLM turboquant_4bit_nc", "TurboQuant", LloydMax(4), Uniform(4)),
    TurboQuant("vLLM turboquant_k3v4_nc", "TurboQuant", LloydMax(3), Uniform(4)),
    TurboQuant("vLLM turboquant_3bit_nc", "TurboQuant", LloydMax(3), Uniform(3)),
    # vLLM cannot be told so; on a model with many layers the dense ones weigh little.
    TurboQuant("turboquant_k8v4, all layers", "TurboQuant, all layers", FP8, Uniform(4), dense=0),
    TurboQuant("turboquant_4bit_nc, all layers", "TurboQuant, all layers", LloydMax(4), Uniform(4), dense=0),
    TurboQuant("turboquant_k3v4_nc, all layers", "TurboQuant, all layers", LloydMax(3), Uniform(4), dense=0),
    TurboQuant("turboquant_3bit_nc, all layers", "TurboQuant, all layers", LloydMax(3), Uniform(3), dense=0),
)
# Ranks that are tried, in eighths of the head size.
EIGHTHS = (1, 2, 4, 6)


def rank_peers(model: PreTrainedModel, windows: Tensor, progress: Callable[[], None]) -> Iterator[Method]:
    """Truncated rank, fitted on token ids `windows` [W, T]."""
    components = principal_components(model, windows, progress)
    head_dim = next(iter(components.values()))[0].mean.shape[-1]
    for eighths in EIGHTHS:
        rank = head_dim * eighths // 8
        yield Rank(f"rank {rank} of {head_dim}", "rank", components, rank)

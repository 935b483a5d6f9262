"""What CUDA graphs demand: a replayed graph reads the addresses it was captured with, and nothing waits for the GPU."""

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_kvsplice.serving.settings import read_settings


class StepBuffer:
    """A number for each token of a step, int64 [T], at the same address in every step."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self._size, self._device = vllm_config.scheduler_config.max_num_batched_tokens, device
        self._buffer: Tensor | None = None

    def hold(self, numbers: Tensor) -> Tensor:
        """The same numbers in the buffer, which is made when first needed."""
        if self._buffer is None:
            self._buffer = torch.zeros(self._size, dtype=torch.int64, device=self._device)
        return self._buffer[: len(numbers)].copy_(numbers)


def graph_support(vllm_config: VllmConfig) -> AttentionCGSupport:
    """Graphs hold steps of one token per sequence: others read raw tokens from scratch pages, which the host plans."""
    captured = read_settings(vllm_config.additional_config).engine == "triton"
    return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if captured else AttentionCGSupport.NEVER

"""The CPU engine: C++ kernels over packed pages (docs/cpu.md). Codes stay codes; products are summed in integers.

`native` is None where the extension was not built; `reference` then serves.
"""

import os
from typing import Any

import torch
from torch import Tensor

from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines.contract import Batch, Window
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP

native: Any
try:
    from vllm_kvsplice.engines.cpu import _native as native  # type: ignore[attr-defined, no-redef]
except ImportError:
    native = None

MISSING = (
    "the C++ engine is not built, so attention runs in the slow reference engine; "
    "install a C++ compiler (g++ 11 or newer) and reinstall, from a copy of the repository, with: "
    "pip install --no-build-isolation ."
)
ISA_VARIABLE = "KVSPLICE_CPU_ISA"


class CpuEngine:
    """`Engine` for one instruction set, the best that the processor has unless another is named."""

    def __init__(self, isa: str | None = None) -> None:
        choices = instruction_sets()
        isa = isa or os.environ.get(ISA_VARIABLE) or choices[0]
        if isa not in choices:
            raise KVSpliceError(f"this processor has no instruction set {isa!r}; choose one of {', '.join(choices)}")
        self.isa = isa
        self._number = choices.index(isa)

    def write(
        self, codec: LayerCodec, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, pages: Tensor
    ) -> None:
        """See `Engine.write`."""
        native.write(_prepared(codec), self._number, key, value, positions, slots, pages)

    def write_window(self, key: Tensor, value: Tensor, slots: Tensor, pages: Tensor) -> None:
        """See `Engine.write_window`."""
        native.write_window(key, value, slots, pages)

    def attend(
        self,
        codec: LayerCodec,
        query: Tensor,
        pages: Tensor,
        batch: Batch,
        scale: float,
        window: Window | None,
        output: Tensor | None = None,
    ) -> Tensor:
        """See `Engine.attend`."""
        if output is None:
            output = torch.empty(int(batch.query_start[-1]), *query.shape[1:], dtype=torch.float32)
        exact = (
            (window.size, window.whole_chunk, window.pages, window.block_table) if window else (0, False, None, None)
        )
        native.attend(
            _prepared(codec),
            self._number,
            query,
            pages,
            batch.query_start,
            batch.seq_lens,
            batch.block_table,
            scale,
            *exact,
            output,
        )
        return output


def instruction_sets() -> list[str]:
    """Those this processor has, best first; none where the extension is not built."""
    return native.instruction_sets() if native else []


def _prepared(codec: LayerCodec) -> Any:
    """The kernels' form of `codec`, made once."""
    fields = vars(codec)
    if "_cpu" not in fields:
        fields["_cpu"] = _prepare(codec)
    return fields["_cpu"]


def _prepare(codec: LayerCodec) -> Any:
    shape = (2, codec.num_kv_heads, codec.head_dim)
    planes = codec.bits.byte[0].view(shape)[..., ::GROUP].tolist()
    rotary = codec.rotary
    return native.Codec(
        vars(codec.key),
        vars(codec.value),
        codec.layout.key,
        codec.layout.value,
        *planes,
        rotary.inv_freq if rotary else None,
        bool(rotary and rotary.interleaved),
        codec.layout.code_bytes,
    )

"""Engines: implementations of one contract, `write` and `attend` over packed pages. `reference` is the specification."""

from typing import Protocol

from torch import Tensor

from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines import reference
from vllm_kvsplice.errors import KVSpliceError


class Engine(Protocol):
    """What an engine module offers; shapes in `vllm_kvsplice.engines.reference`."""

    def write(
        self, codec: LayerCodec, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, pages: Tensor
    ) -> None: ...

    def attend(
        self,
        codec: LayerCodec,
        query: Tensor,
        pages: Tensor,
        block_table: Tensor,
        query_start: list[int],
        seq_lens: list[int],
        scale: float,
    ) -> Tensor: ...


ENGINES: dict[str, Engine] = {"reference": reference}


def get_engine(name: str) -> Engine:
    """The engine called `name`; raises `KVSpliceError` naming the choices."""
    if name not in ENGINES:
        raise KVSpliceError(f"engine {name!r} is unknown; choose one of {', '.join(sorted(ENGINES))}")
    return ENGINES[name]

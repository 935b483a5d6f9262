"""The GPU engine for tests, whose tensors live on the CPU: on a GPU where there is one, else in Triton's interpreter."""

import os
from dataclasses import replace

import torch
from torch import Tensor

from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines import Batch, Window
from vllm_kvsplice.engines.triton import TritonEngine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Triton asks whenever kernels are defined, its own included, so `conftest` loads this before anything imports it.
    os.environ["TRITON_INTERPRET"] = "1"


class OnDevice:
    """`Engine`: copies to the device and back, strides and gaps included.

    Queries and probabilities have float16's 11 bits. Relative to the largest output, measured in the interpreter over
    every small case of `test_engines`: 2.1e-4 from the oracle. A GPU rounds exact windows of float32 to as many bits, which
    the interpreter does not where products are in tf32: 6.7e-4 on an H200.
    """

    oracle_limit = 5e-4 if DEVICE.type == "cpu" else 1e-3
    order_limit = oracle_limit

    def __init__(self) -> None:
        self._engine = TritonEngine()
        self._there: dict[int, tuple[LayerCodec, LayerCodec]] = {}

    def write(
        self, codec: LayerCodec, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, pages: Tensor
    ) -> None:
        there = moved(pages)
        self._engine.write(self._codec(codec), *map(moved, (key, value, positions, slots)), there)
        brought_back(there, pages)

    def write_window(self, key: Tensor, value: Tensor, slots: Tensor, pages: Tensor) -> None:
        there = moved(pages)
        self._engine.write_window(*map(moved, (key, value, slots)), there)
        brought_back(there, pages)

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
        if window:
            window = replace(window, pages=moved(window.pages), block_table=moved(window.block_table))
        batch = Batch(*map(moved, (batch.query_start, batch.seq_lens, batch.block_table)), batch.longest)
        found = self._engine.attend(self._codec(codec), moved(query), moved(pages), batch, scale, window).cpu()
        return found if output is None else output.copy_(found)

    def _codec(self, codec: LayerCodec) -> LayerCodec:
        if DEVICE.type == "cpu":
            return codec
        return self._there.setdefault(id(codec), (codec, codec.to(DEVICE)))[1]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor's storage as one row."""
    length = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.as_strided((length,), (1,), 0)


def moved(tensor: Tensor) -> Tensor:
    """The tensor on the device with the same strides and what lies between."""
    if DEVICE.type == "cpu":
        return tensor
    return whole(tensor).to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def brought_back(there: Tensor, tensor: Tensor) -> None:
    if DEVICE.type != "cpu":
        whole(tensor).copy_(whole(there))

"""Engines: implementations of the contract in `contract`.

`reference` is the specification, `cpu` needs a compiler, `triton` an NVIDIA GPU.
"""

import torch

from vllm_kvsplice.engines import reference
from vllm_kvsplice.engines.contract import DEFAULT_WINDOW, LARGEST_HEAD, MAX_WINDOW, Batch, Engine, Window
from vllm_kvsplice.engines.cpu import CpuEngine, native
from vllm_kvsplice.engines.triton import TritonEngine
from vllm_kvsplice.errors import KVSpliceError

__all__ = [
    "DEFAULT_WINDOW",
    "ENGINES",
    "LARGEST_HEAD",
    "MAX_WINDOW",
    "Batch",
    "Engine",
    "Window",
    "default_engine",
    "get_engine",
]

NVIDIA = torch.cuda.is_available() and torch.version.hip is None
ENGINES: dict[str, Engine] = {"reference": reference}
if native:
    ENGINES["cpu"] = CpuEngine()
if NVIDIA:
    ENGINES["triton"] = TritonEngine()


def default_engine() -> str:
    """The fastest engine that is installed and works where vLLM keeps its cache."""
    if NVIDIA:
        return "triton"
    return "cpu" if "cpu" in ENGINES and not torch.cuda.is_available() else "reference"


def get_engine(name: str) -> Engine:
    """The engine called `name`; raises `KVSpliceError` naming the choices."""
    if name not in ENGINES:
        raise KVSpliceError(f"engine {name!r} is unknown; choose one of {', '.join(sorted(ENGINES))}")
    return ENGINES[name]

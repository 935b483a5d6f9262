"""Every engine that this machine can run, on one thread."""

import pytest
import torch

from tests.cases import threads
from tests.engines.device import OnDevice
from vllm_kvsplice.engines import Engine, get_engine
from vllm_kvsplice.engines.cpu import CpuEngine, instruction_sets

ON_GPU = [pytest.param("triton", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in instruction_sets()), *ON_GPU])
def engine(request) -> Engine:
    name, _, isa = request.param.partition("-")
    return OnDevice() if name == "triton" else CpuEngine(isa) if isa else get_engine(name)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield

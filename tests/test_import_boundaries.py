"""What importing loads. The codec, the artifact and calibration work where neither vLLM nor Triton can be imported."""

import json
import subprocess
import sys

import pytest

# Imports the modules named on the command line, hiding those whose name has a minus before it. Prints what is loaded
# then, and what our own modules asked for: torch and transformers load Triton on their own account, if it is there.
PROBE = """
import builtins, importlib, json, sys

def watched(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__name__", "").startswith(("vllm_kvsplice", "calibration")):
        asked.add(name.split(".")[0])
    return plain(name, globals, locals, fromlist, level)

asked, plain = set(), builtins.__import__
builtins.__import__ = watched
for name in sys.argv[1:]:
    if name.startswith("-"):
        sys.modules[name[1:]] = None
    else:
        importlib.import_module(name)
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module}
print(json.dumps([sorted(asked), sorted(loaded)]))
"""
MODULES = [
    *("vllm_kvsplice.artifact", "vllm_kvsplice.codec", "vllm_kvsplice.layout", "vllm_kvsplice.rotary"),
    *("vllm_kvsplice.engines", "vllm_kvsplice.engines.reference", "calibration.pipeline"),
    *("calibration.planners", "calibration.fim.measure", "calibration.fim.report", "calibration.fim.tracking"),
    *("calibration.fim.callback", "calibration.compare.run", "calibration.compare.plots"),
    *("vllm_kvsplice.hub", "vllm_kvsplice.huggingface"),
]


def imports(*names: str) -> tuple[set[str], set[str]]:
    """Top-level packages that our modules ask for, and those loaded in all, in a fresh interpreter."""
    command = [sys.executable, "-c", PROBE, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    asked, loaded = json.loads(done.stdout.splitlines()[-1])
    return set(asked), set(loaded)


@pytest.mark.parametrize("name", ["vllm_kvsplice", "vllm_kvsplice.errors", "vllm_kvsplice.cli", "vllm_kvsplice.doctor"])
def test_help_appears_without_waiting_for_torch(name: str) -> None:
    _, loaded = imports(name)
    assert "vllm_kvsplice" in loaded
    assert not {"torch", "transformers", "vllm", "triton", "calibration"} & loaded


def test_codec_and_calibration_ask_for_neither_vllm_nor_triton() -> None:
    asked, loaded = imports(*MODULES)
    assert {"torch", "pydantic", "safetensors"} <= asked
    assert not {"vllm", "triton"} & asked
    assert "vllm" not in loaded


def test_codec_and_calibration_work_where_vllm_and_triton_are_absent() -> None:
    imports("-vllm", "-triton", "-wandb", *MODULES)


def test_the_artifact_alone_loads_no_triton() -> None:
    _, loaded = imports("vllm_kvsplice.artifact", "vllm_kvsplice.engines")
    assert not {"vllm", "triton", "transformers", "calibration"} & loaded

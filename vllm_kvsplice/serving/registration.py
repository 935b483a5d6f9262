"""What vLLM calls in every process of every server, also of those that do not ask for KVSplice: nothing here may end them.

vLLM skips a plugin that cannot be imported, and would then serve uncompressed whoever asked for it. So all that may fail,
on a vLLM whose insides have moved or in an environment set up wrongly, is loaded here, and kept for those who ask.
"""

import sys
from types import TracebackType
from typing import Any

from vllm_kvsplice.errors import KVSpliceError

NAMESPACE = "kvsplice"


def register() -> None:
    """Make the backend selectable as CUSTOM, or else refuse whoever selects it. Safe to call again."""
    try:
        from vllm_kvsplice.serving.plugin import register as register_plugin

        register_plugin()
    # Anything may be missing in a vLLM that we do not know.
    except Exception as error:
        _refuse(error)


def _refuse(reason: Exception) -> None:
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        if asked_for(vllm_config):
            print_without_traceback()
            details = str(reason) if isinstance(reason, KVSpliceError) else f"{type(reason).__name__}: {reason}"
            raise KVSpliceError(f"KVSplice does not load ({details}); look what is missing with: kvsplice doctor")
        original(cls, vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)


def asked_for(vllm_config: Any) -> bool:
    """Whether a configuration, of any vLLM, names our settings, or the backend CUSTOM while that is nobody else's."""
    settings = getattr(vllm_config, "additional_config", None)
    if isinstance(settings, dict) and NAMESPACE in settings:
        return True
    backend: Any = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    if getattr(backend, "name", None) != "CUSTOM":
        return False
    try:
        path = backend.get_path()
    except ValueError:
        return True
    # Ours where registration failed half-way.
    return not path or path.startswith("vllm_kvsplice.")


def print_without_traceback() -> None:
    """A server that stops for a user's mistake ends with the one sentence that mends it."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, KVSpliceError):
            print(f"kvsplice: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook

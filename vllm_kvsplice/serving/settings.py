"""From vLLM's configuration to a checked artifact."""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvsplice.artifact import Artifact, load_artifact
from vllm_kvsplice.engines import MAX_WINDOW, default_engine, get_engine
from vllm_kvsplice.errors import ArtifactError, KVSpliceError
from vllm_kvsplice.serving.registration import NAMESPACE

FILLED_IN = ("digest", "window_block")


class Settings(BaseModel):
    """``--additional-config '{"kvsplice": {...}}'``.

    Attributes:
        artifact: directory, or name on the Hugging Face Hub; None means the folder `kvsplice` of the model.
        engine: kernel implementation; the fastest that is installed unless named.
        recent_window: W; a query reads the last W tokens exactly. 0: everything as stored. Filled in at start.
        prefill: `stored` reads a prompt by the same rule. `exact` reads all of a step's own tokens exactly, so that a
            prompt's states are better and the answer depends on how it was cut into steps.
        digest: of the artifact. Filled in at start, so that it enters vLLM's hash of the configuration and every process
            reads the same artifact.
        window_block: tokens in a block of the window's cache. Filled in at start.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: str | None = None
    engine: str = Field(default_factory=default_engine)
    recent_window: int | None = Field(default=None, ge=0, le=MAX_WINDOW)
    prefill: Literal["stored", "exact"] = "stored"
    digest: str | None = None
    window_block: int | None = None

    @property
    def is_filled_in(self) -> bool:
        """Whether a start has filled in what it fills in."""
        return self.digest is not None and (self.recent_window == 0 or self.window_block is not None)


def read_settings(additional_config: Any) -> Settings:
    """The `kvsplice` part of vLLM's ``additional_config``; raises `KVSpliceError` on anything unknown in it."""
    section = additional_config.get(NAMESPACE, {}) if isinstance(additional_config, dict) else {}
    try:
        settings = Settings.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (NAMESPACE, *first["loc"])))
        choices = ", ".join(name for name in Settings.model_fields if name not in FILLED_IN)
        raise KVSpliceError(f"additional_config is wrong at {where}: {first['msg']}; it takes {choices}") from error
    get_engine(settings.engine)
    return settings


@lru_cache(maxsize=2)
def open_artifact(directory: Path, digest: str | None) -> Artifact:
    """Load and check an artifact once per process; with `digest`, insist that it is still that one."""
    artifact = load_artifact(directory)
    if digest not in (None, artifact.digest):
        raise ArtifactError(
            f"the artifact at {directory} is not the one that was named ({digest[:12]}): it changed while the server was "
            "starting, so start it again; or additional_config has a digest, which belongs to an earlier start, so drop it"
        )
    return artifact

"""An artifact on disk: replaced whole or not at all, and read without believing what lies there."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

from vllm_kvsplice.artifact.contents import TENSORS, Artifact, parse_artifact, serialise
from vllm_kvsplice.artifact.manifest import MANIFEST
from vllm_kvsplice.errors import ArtifactError

# On the Hub an artifact has a model card beside it, which nothing here reads.
CARD = "README.md"
MANIFEST_LIMIT = 4 << 20
TENSORS_LIMIT = 4 << 30


def save_artifact(artifact: Artifact, directory: Path) -> Artifact:
    """Write an artifact; what stood in `directory` is replaced only once everything is written. Returns `artifact`.

    Raises:
        ArtifactError: `directory` holds something other than an artifact.
        OSError: the disk is full or not writable; `directory` is then as it was.

    """
    check_target(directory)
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        (staging / "new").mkdir()
        for name, content in zip((MANIFEST, TENSORS), serialise(artifact.manifest, artifact.tensors), strict=True):
            (staging / "new" / name).write_bytes(content)
        _swap(staging / "new", directory, staging / "old")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return artifact


def _swap(new: Path, directory: Path, old: Path) -> None:
    """Put `new` in the place of `directory`, or leave everything as it was."""
    if directory.exists():
        directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        if old.exists():
            old.rename(directory)
        raise


def check_target(directory: Path) -> None:
    """Raise `ArtifactError` if writing an artifact to `directory` would overwrite anything but an artifact."""
    if directory.exists() and (not directory.is_dir() or set(os.listdir(directory)) - {MANIFEST, TENSORS, CARD}):
        raise ArtifactError(f"{directory} exists and is no artifact; choose another --out directory")
    if Path.cwd().is_relative_to(directory.resolve()):
        raise ArtifactError(
            f"{directory} is the directory you are in, which would be replaced; choose another --out directory"
        )


def load_artifact(directory: Path | str) -> Artifact:
    """Read and check the artifact in `directory`.

    Raises:
        ArtifactError: anything at all is wrong with it; the message says what, and what to do.

    """
    root = Path(directory)
    if not os.path.isdir(root):
        raise ArtifactError(f"there is no artifact at {root}; make one with: kvsplice calibrate MODEL --out {root}")
    try:
        return parse_artifact(_read(root, MANIFEST, MANIFEST_LIMIT), _read(root, TENSORS, TENSORS_LIMIT))
    except ArtifactError as error:
        raise ArtifactError(
            f"the artifact at {root} cannot be used: {error}; make it anew with: kvsplice calibrate MODEL --out {root}"
        ) from error


def _read(root: Path, name: str, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit`, read once. Links may not lead out of the artifact.

    A Hugging Face cache is the exception: its snapshots are links into the `blobs` folder of the same repository.
    """
    path = root / name
    allowed = [root.resolve()]
    if "snapshots" in root.resolve().parts:
        parts = root.resolve().parts
        last = len(parts) - 1 - parts[::-1].index("snapshots")
        allowed.append(Path(*parts[:last]) / "blobs")
    try:
        resolved = path.resolve(strict=True)
        if not any(resolved.is_relative_to(folder) for folder in allowed):
            raise ArtifactError(f"{name} is a link out of the artifact")
        with open(resolved, "rb", opener=_open_as_is) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"{name} is not a regular file")
            if status.st_size > limit:
                raise ArtifactError(f"{name} has {status.st_size} bytes, more than the {limit} allowed")
            return file.read(limit)
    except FileNotFoundError:
        raise ArtifactError(f"{name} is missing") from None
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{name} cannot be read ({error})") from error


def _open_as_is(path: str, flags: int) -> int:
    """Neither follow a link that has just appeared nor wait for whoever writes into a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

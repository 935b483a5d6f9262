"""Artifacts by name: found in a directory, in a model's, or on the Hugging Face Hub, and pushed there with a model card."""

import os
import tempfile
from pathlib import Path, PurePosixPath

from vllm_kvsplice.artifact import CARD, MANIFEST, TENSORS, Artifact, load_artifact, save_artifact
from vllm_kvsplice.card import model_card
from vllm_kvsplice.errors import ArtifactError, KVSpliceError

# Where a model's own directory or repository has its artifact.
FOLDER = "kvsplice"


def from_pretrained(artifact: Artifact | Path | str | None, model: str = "MODEL") -> Artifact:
    """A checked artifact: as it is, or by directory or Hub name, or else that of `model`.

    Raises:
        ArtifactError: there is none, or something is wrong with it; the message names the command that makes one.

    """
    if isinstance(artifact, Artifact):
        return artifact
    return load_artifact(locate_artifact(None if artifact is None else str(artifact), model))


def locate_artifact(artifact: str | None, model: str) -> Path:
    """The directory of an artifact given by path or Hub name, or else inside `model`.

    Raises:
        ArtifactError: there is none; the message names the command that makes one.

    """
    if artifact is not None:
        return Path(artifact) if os.path.isdir(artifact) else _from_hub(artifact, "", model)
    inside = Path(model) / FOLDER
    if inside.is_dir() or os.path.isdir(model):
        if not inside.is_dir():
            raise ArtifactError(
                f"no KVSplice artifact for {model}; make one with: kvsplice calibrate {model} --out {inside}"
            )
        return inside
    return _from_hub(model, FOLDER, model)


def _from_hub(repository: str, folder: str, model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # No more, because what is named may be a model.
    wanted = [str(PurePosixPath(folder, name)) for name in (MANIFEST, TENSORS)]
    try:
        found = Path(snapshot_download(repository, allow_patterns=wanted)) / folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"{repository} is neither an artifact directory nor an artifact on the Hub that can be reached; "
            f"make one with: kvsplice calibrate {model} --out DIR"
        ) from error
    if not found.is_dir():
        raise ArtifactError(f"{repository} holds no artifact; make one with: kvsplice calibrate {model} --out DIR")
    return found


def push_to_hub(artifact: Artifact | Path | str, repository: str, private: bool = False) -> str:
    """Upload an artifact and its card to the Hub as `repository` (made if there is none); returns its address there.

    Raises:
        ArtifactError: there is no sound artifact.
        KVSpliceError: the Hub cannot be reached, or does not let us.

    """
    from huggingface_hub import HfApi

    loaded, api = from_pretrained(artifact), HfApi()
    with tempfile.TemporaryDirectory() as folder:
        content = Path(folder) / FOLDER
        save_artifact(loaded, content)
        (content / CARD).write_text(model_card(loaded, repository))
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            message = f"KVSplice artifact {loaded.digest[:12]}"
            api.upload_folder(repo_id=repository, folder_path=content, commit_message=message)
        # Of the HTTP library that the Hub's client happens to use, or of its own.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise KVSpliceError(
                f"cannot push to {repository} ({reason}); log in with: hf auth login, and name it OWNER/NAME"
            ) from error
    return str(address)

"""The artifact: what calibration exports and the server loads. Format in docs/artifact.md.

A directory with `kvsplice.json` (the manifest) and `kvsplice.safetensors` (float32 tensors).
The manifest holds the SHA-256 of the tensors' file, so the manifest's own SHA-256 names the whole artifact: its digest.
Nothing in an artifact is ever executed, and nothing is believed before it is checked.
"""

from vllm_kvsplice.artifact.contents import (
    TENSORS,
    Artifact,
    expected_tensors,
    heads_of_rank,
    make_artifact,
    pack_levels,
    parse_artifact,
    unpack_levels,
)
from vllm_kvsplice.artifact.files import CARD, check_target, load_artifact, save_artifact
from vllm_kvsplice.artifact.manifest import (
    BASELINE_BITS,
    MANIFEST,
    LayerPlan,
    Manifest,
    ModelShape,
    Provenance,
    Quality,
    RotaryShape,
)

__all__ = [
    "BASELINE_BITS",
    "CARD",
    "MANIFEST",
    "TENSORS",
    "Artifact",
    "LayerPlan",
    "Manifest",
    "ModelShape",
    "Provenance",
    "Quality",
    "RotaryShape",
    "check_target",
    "expected_tensors",
    "heads_of_rank",
    "load_artifact",
    "make_artifact",
    "pack_levels",
    "parse_artifact",
    "save_artifact",
    "unpack_levels",
]

"""Small random artifacts, and their two files in pieces, so that a test can spoil one thing and keep the rest right.

Three layers of 2 KV heads of 16 dimensions (2 groups of 8 each); the middle layer is dense. The widths cover 0..8.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_kvsplice.artifact import (
    MANIFEST,
    TENSORS,
    Artifact,
    LayerPlan,
    Manifest,
    ModelShape,
    Provenance,
    Quality,
    RotaryShape,
    expected_tensors,
    make_artifact,
    save_artifact,
)

WIDE = LayerPlan(key=((0, 8), (1, 3)), value=((2, 7), (4, 5)))
NARROW = LayerPlan(key=((6, 4), (0, 0)), value=((2, 1), (1, 0)))
SHAPE = ModelShape(
    model_type="llama",
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_size=64,
    vocab_size=100,
    rope='{"rope_theta": 10000.0, "rope_type": "default"}',
)
PROVENANCE = Provenance(
    model="a/model",
    text="pydoc",
    text_sha256="0" * 64,
    tokens=16384,
    context=1024,
    recent=32,
    seed=0,
    fit="random",
    planner="budget",
    requested="4 bits",
    expected_change_percent=2.0,
    created="2026-01-01T00:00:00Z",
    versions={"torch": "2.13.0"},
)
QUALITY = Quality(mode="all", baseline_ppl=10.0, ppl=10.25, change_percent=2.5, tokens=2048, context=1024)


def sample(rotary: bool = True, layers: tuple[LayerPlan | None, ...] = (WIDE, None, NARROW), seed: int = 0) -> Artifact:
    """A valid artifact with random tensors."""
    manifest = Manifest(
        model=SHAPE.model_copy(update={"num_layers": len(layers)} | ({} if rotary else {"rope": "null"})),
        rotary=RotaryShape(pairs=8, interleaved=False, skips=(len(layers) - 1,)) if rotary else None,
        layers=layers,
        provenance=PROVENANCE,
        quality=QUALITY,
        tensors_sha256="0" * 64,
    )
    torch.manual_seed(seed)
    tensors = {name: torch.randn(shape) for name, shape in expected_tensors(manifest).items()}
    for kind in ("key", "value"):
        tensors[f"{kind}.sink_scale"] = tensors[f"{kind}.sink_scale"].abs()
        widths = [w for layer in layers if layer for head in getattr(layer, kind) for w in head if w]
        books = [torch.randperm(256)[: 1 << w].sort().values - 128.0 for w in widths]
        tensors[f"{kind}.levels"] = torch.cat([torch.empty(0), *books])
    if rotary:
        tensors["rotary.inv_freq"] = 10000.0 ** -(torch.arange(8) / 8)
    return make_artifact(manifest, tensors)


def model_config(**changes: Any) -> SimpleNamespace:
    """A Hugging Face configuration of the model that samples belong to, or with `changes` of another one."""
    fields = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_size": 64,
        "vocab_size": 100,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    text = SimpleNamespace(**fields | changes)
    return SimpleNamespace(get_text_config=lambda: text)


class Files(NamedTuple):
    """The bytes of the two files."""

    manifest: bytes
    tensors: bytes

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in zip((MANIFEST, TENSORS), self, strict=True):
            (directory / name).write_bytes(content)


def files_of(artifact: Artifact) -> Files:
    """What saving writes."""
    with TemporaryDirectory() as folder:
        save_artifact(artifact, Path(folder))
        return Files(*((Path(folder) / name).read_bytes() for name in (MANIFEST, TENSORS)))


def sign(manifest: dict[str, Any], blob: bytes) -> Files:
    """Both files, the manifest with the right SHA-256 of the other."""
    manifest = manifest | {"tensors_sha256": hashlib.sha256(blob).hexdigest()}
    return Files(json.dumps(manifest).encode(), blob)


def frame(header: Any, data: bytes) -> bytes:
    """A safetensors file: `header` as JSON (or as given, if bytes) with its length before it and `data` after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Draft:
    """An artifact taken apart: manifest and header as dictionaries, tensors as writable numpy arrays over `data`."""

    def __init__(self, files: Files) -> None:
        self.manifest = json.loads(files.manifest)
        (size,) = struct.unpack("<Q", files.tensors[:8])
        self.header = json.loads(files.tensors[8 : 8 + size])
        self.data = bytearray(files.tensors[8 + size :])

    def array(self, name: str) -> np.ndarray:
        start, end = self.header[name]["data_offsets"]
        return np.frombuffer(self.data, "<f4")[start // 4 : end // 4]

    @property
    def blob(self) -> bytes:
        return frame(self.header, bytes(self.data))

    def files(self) -> Files:
        return sign(self.manifest, self.blob)


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values below `tree`, parents first."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from nodes(child, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


Spoil = Callable[[Draft], Files | None]

"""The artifact: what calibration exports and the server loads. Format in docs/artifact.md.

A directory with `kvsplice.json` (the manifest, checked by the models below) and `kvsplice.safetensors` (float32 tensors).
The manifest holds the SHA-256 of the tensors' file, so the manifest's own SHA-256 names the whole artifact: its digest.
Nothing in an artifact is ever executed, and nothing is believed before it is checked.
"""

import hashlib
import json
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from vllm_kvsplice.codec import HIGHEST_LEVEL, LEVELS, LOWEST_LEVEL, KindCodec, LayerCodec
from vllm_kvsplice.errors import ArtifactError
from vllm_kvsplice.layout import GROUP, MAX_WIDTH, LayerLayout
from vllm_kvsplice.rotary import Rotary

MANIFEST = "kvsplice.json"
TENSORS = "kvsplice.safetensors"
# On the Hub an artifact has a model card beside it, which nothing here reads.
CARD = "README.md"
VERSION = 1
MANIFEST_LIMIT = 4 << 20
TENSORS_LIMIT = 4 << 30
HEADER_LIMIT = 1 << 20
BASELINE_BITS = 16

Count = Annotated[int, Field(ge=1, le=1 << 20)]
Index = Annotated[int, Field(ge=0, lt=1 << 20)]
Width = Annotated[int, Field(ge=0, le=MAX_WIDTH)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelShape(_Strict):
    """What a model must share with the one that was calibrated. `rope` is canonical JSON, "null" without rotation."""

    model_type: str
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    hidden_size: Count
    vocab_size: Count
    rope: str

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """The shape in a Hugging Face model configuration (of the text part, if it has several)."""
        config = config.get_text_config()
        if not getattr(config, "num_attention_heads", None):
            raise ArtifactError(
                f"a model of type {config.model_type} has no attention heads whose cache could be compressed"
            )
        rope = getattr(config, "rope_parameters", None)
        return cls(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            rope=json.dumps(rope, sort_keys=True, default=str),
        )


class RotaryShape(_Strict):
    """Number of rotated pairs of dimensions, how they are paired, and layers left out (see `vllm_kvsplice.rotary`)."""

    pairs: Count
    interleaved: bool
    skips: tuple[Index, ...] = ()


class LayerPlan(_Strict):
    """Width in bits of each group of 8 latents, [H][D / 8], of one compressed layer."""

    key: tuple[tuple[Width, ...], ...]
    value: tuple[tuple[Width, ...], ...]

    @cached_property
    def layout(self) -> LayerLayout:
        return LayerLayout(self.key, self.value)


class Quality(_Strict):
    """Perplexity on text that was not calibrated on; the fields of ``kvsplice eval --json``."""

    mode: Literal["all", "serving"]
    baseline_ppl: float
    ppl: float
    change_percent: float
    tokens: int
    context: int


class Provenance(_Strict):
    """How the artifact came to be. `expected_change_percent` is what the planner expected of perplexity."""

    model: str
    text: str
    text_sha256: str
    tokens: int
    context: int
    seed: int
    fit: str
    planner: str
    requested: str
    expected_change_percent: float
    created: str
    versions: dict[str, str]


class Manifest(_Strict):
    """`kvsplice.json`. A layer that is null keeps its dense cache."""

    format: Literal["kvsplice"] = "kvsplice"
    version: Literal[1] = 1
    model: ModelShape
    rotary: RotaryShape | None
    layers: tuple[LayerPlan | None, ...]
    provenance: Provenance
    quality: Quality | None
    tensors_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Artifact:
    """A checked artifact in memory. `tensors` are those of `expected_tensors`; `digest` is the manifest's SHA-256."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    digest: str

    @property
    def compressed_layers(self) -> list[int]:
        return [i for i, layer in enumerate(self.manifest.layers) if layer is not None]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in every layer; dense layers count as 16 bits."""
        dense = self.baseline_bytes_per_token // self.manifest.model.num_layers
        return sum(layer.layout.token_bytes if layer else dense for layer in self.manifest.layers)

    @property
    def baseline_bytes_per_token(self) -> int:
        """The same for an uncompressed 16-bit cache."""
        shape = self.manifest.model
        return shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * BASELINE_BITS // 8

    @property
    def covers_all_layers(self) -> bool:
        return len(self.compressed_layers) == self.manifest.model.num_layers

    @property
    def bits_per_element(self) -> float:
        """Bits per key or value element over all layers, padding included."""
        return BASELINE_BITS * self.bytes_per_token / self.baseline_bytes_per_token

    @property
    def bits_where_compressed(self) -> float:
        """The same over the compressed layers alone, which is what a plan's bits are of."""
        layers = [layer for layer in self.manifest.layers if layer]
        baseline = self.baseline_bytes_per_token * len(layers) / self.manifest.model.num_layers
        return BASELINE_BITS * sum(layer.layout.token_bytes for layer in layers) / baseline

    def with_quality(self, quality: Quality) -> "Artifact":
        """The same artifact, carrying its measured quality (and so another digest)."""
        return make_artifact(self.manifest.model_copy(update={"quality": quality}), self.tensors)

    @cached_property
    def rotary(self) -> Rotary | None:
        shape = self.manifest.rotary
        return Rotary(self.tensors["rotary.inv_freq"], shape.interleaved, shape.skips) if shape else None

    def layer(self, index: int) -> LayerCodec:
        """Codec of the model's layer `index`, which must be a compressed one."""
        plan = self.manifest.layers[index]
        assert plan is not None, f"layer {index} is dense"
        row = self.compressed_layers.index(index)
        kinds = [
            KindCodec(
                mean=self.tensors[f"{kind}.mean"][row],
                analysis=self.tensors[f"{kind}.analysis"][row],
                synthesis=self.tensors[f"{kind}.synthesis"][row],
                levels=self._levels[kind][row],
                sink=self.tensors[f"{kind}.sink"][row],
                sink_scale=self.tensors[f"{kind}.sink_scale"][row],
            )
            for kind in ("key", "value")
        ]
        return LayerCodec(kinds[0], kinds[1], plan.layout, self.rotary and self.rotary.at(index))

    @cached_property
    def codecs(self) -> dict[int, LayerCodec]:
        """Codecs of the compressed layers by the model's numbers, made once."""
        return {index: self.layer(index) for index in self.compressed_layers}

    def layer_shard(self, index: int, rank: int, ranks: int) -> LayerCodec:
        """The same for one of several tensor-parallel ranks; all ranks use pages of the same size."""
        shape, plan = self.manifest.model, self.manifest.layers[index]
        assert plan is not None, f"layer {index} is dense"
        sizes = [plan.layout.shard(heads_of_rank(shape.num_kv_heads, r, ranks), 0).token_bytes for r in range(ranks)]
        return self.layer(index).shard(heads_of_rank(shape.num_kv_heads, rank, ranks), max(sizes))

    @cached_property
    def _levels(self) -> dict[str, Tensor]:
        plans = [self.manifest.layers[i] for i in self.compressed_layers]
        return {
            kind: unpack_levels(self.tensors[f"{kind}.levels"], [getattr(plan, kind) for plan in plans])
            for kind in ("key", "value")
        }

    def check_model(self, config: Any) -> None:
        """Raise `ArtifactError` unless `config` (Hugging Face) describes the model this was calibrated on."""
        served, own = ModelShape.of(config), self.manifest.model
        differing = [name for name in ModelShape.model_fields if getattr(served, name) != getattr(own, name)]
        if differing:
            details = ", ".join(f"{n} {getattr(own, n)} instead of {getattr(served, n)}" for n in differing)
            raise ArtifactError(
                f"the artifact was calibrated on another model ({details}); "
                "make one for this model with: kvsplice calibrate MODEL --out DIR"
            )


def heads_of_rank(num_kv_heads: int, rank: int, ranks: int) -> list[int]:
    """KV heads that a tensor-parallel rank holds in vLLM: a slice, or a replica when there are more ranks than heads."""
    if num_kv_heads >= ranks:
        share = num_kv_heads // ranks
        return list(range(rank * share, (rank + 1) * share))
    return [rank * num_kv_heads // ranks]


def pack_levels(levels: Tensor, widths: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Codebooks end to end: the first 2**b of [Lc, H, G, 256] for each group of b > 0 bits."""
    groups = [w for layer in widths for head in layer for w in head]
    parts = [row[: 1 << w] for row, w in zip(levels.flatten(0, 2), groups, strict=True) if w]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32)


def unpack_levels(packed: Tensor, widths: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """The inverse of `pack_levels`; positions past 2**b repeat the last level, groups of no bits are zero."""
    groups = [w for layer in widths for head in layer for w in head]
    # Explicit, because vLLM sets the default dtype to the model's while it loads.
    levels = torch.zeros(len(groups), LEVELS, dtype=torch.float32)
    start = 0
    for row, width in zip(levels, groups, strict=True):
        if width:
            size = 1 << width
            row[:size] = packed[start : start + size]
            row[size:] = packed[start + size - 1]
            start += size
    return levels.view(len(widths), len(widths[0]), len(widths[0][0]), LEVELS)


def expected_tensors(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the tensors' file must hold, no more and no fewer; all are float32."""
    shape = manifest.model
    plans = [layer for layer in manifest.layers if layer]
    rows, heads, dim = len(plans), shape.num_kv_heads, shape.head_dim
    expected: dict[str, tuple[int, ...]] = {}
    for kind in ("key", "value"):
        widths = [w for plan in plans for head in getattr(plan, kind) for w in head]
        expected[f"{kind}.mean"] = expected[f"{kind}.sink"] = expected[f"{kind}.sink_scale"] = (rows, heads, dim)
        expected[f"{kind}.analysis"] = expected[f"{kind}.synthesis"] = (rows, heads, dim, dim)
        expected[f"{kind}.levels"] = (sum(1 << w for w in widths if w),)
    if manifest.rotary:
        expected["rotary.inv_freq"] = (manifest.rotary.pairs,)
    return expected


def make_artifact(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Artifact:
    """A checked artifact from its parts; `manifest.tensors_sha256` is filled in here."""
    return parse_artifact(*_serialise(manifest, tensors))


def _serialise(manifest: Manifest, tensors: Mapping[str, Tensor]) -> tuple[bytes, bytes]:
    blob = safetensors.torch.save({name: tensor.float().contiguous() for name, tensor in tensors.items()})
    manifest = manifest.model_copy(update={"tensors_sha256": hashlib.sha256(blob).hexdigest()})
    return manifest.model_dump_json(indent=1).encode(), blob


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
        for name, content in zip((MANIFEST, TENSORS), _serialise(artifact.manifest, artifact.tensors), strict=True):
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


def parse_artifact(manifest_bytes: bytes, tensor_bytes: bytes) -> Artifact:
    """Check the two files' contents; raises `ArtifactError` with the reason alone."""
    manifest = _parse_manifest(manifest_bytes)
    if hashlib.sha256(tensor_bytes).hexdigest() != manifest.tensors_sha256:
        raise ArtifactError(f"{TENSORS} is not the file that {MANIFEST} was written with (its SHA-256 differs)")
    expected = expected_tensors(manifest)
    _check_header(tensor_bytes, expected)
    tensors = safetensors.torch.load(tensor_bytes)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtifactError(f"tensor {name} holds values that are not finite")
    artifact = Artifact(manifest, tensors, hashlib.sha256(manifest_bytes).hexdigest())
    _check_values(artifact)
    return artifact


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


def _parse_manifest(text: bytes) -> Manifest:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ArtifactError(f"{MANIFEST} names a field twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ArtifactError(f"{MANIFEST} holds {constant}, which is no number")

    try:
        raw = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST} is not JSON ({error})") from error
    if not isinstance(raw, dict) or raw.get("format") != "kvsplice":
        raise ArtifactError(f'{MANIFEST} is not a KVSplice manifest ("format" is not "kvsplice")')
    version = raw.get("version")
    if type(version) is not int or version != VERSION:
        raise ArtifactError(f"format version {_shown(version)} is not {VERSION}, the one this package reads")
    try:
        # Through JSON again because only there does pydantic's strict mode take lists for tuples.
        manifest = Manifest.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top level"
        raise ArtifactError(f"{MANIFEST} is wrong at {_shown(where)}: {_shown(first['msg'])}") from error
    _check_plan(manifest)
    return manifest


def _shown(found: object) -> str:
    """Something from a file nobody vouches for, fit to print: one short line without control characters."""
    return str(found)[:100].encode("unicode_escape").decode()


def _check_plan(manifest: Manifest) -> None:
    shape = manifest.model
    if shape.head_dim % GROUP or shape.num_heads % shape.num_kv_heads:
        raise ArtifactError(
            f"{shape.num_heads} heads, {shape.num_kv_heads} KV heads of {shape.head_dim} dimensions do not fit together"
        )
    if len(manifest.layers) != shape.num_layers:
        raise ArtifactError(f"it plans {len(manifest.layers)} layers, the model has {shape.num_layers}")
    if not any(manifest.layers):
        raise ArtifactError(f"none of its {shape.num_layers} layers is compressed")
    if rotary := manifest.rotary:
        if 2 * rotary.pairs > shape.head_dim:
            raise ArtifactError(f"{rotary.pairs} rotary pairs do not fit {shape.head_dim} dimensions")
        if list(rotary.skips) != sorted(set(rotary.skips) & set(range(shape.num_layers))):
            raise ArtifactError(f"its rotation skips layers {list(rotary.skips)} of {shape.num_layers}")
    for index, layer in enumerate(manifest.layers):
        for kind in ("key", "value"):
            heads = getattr(layer, kind) if layer else ()
            if layer and (len(heads) != shape.num_kv_heads or any(len(h) != shape.head_dim // GROUP for h in heads)):
                raise ArtifactError(f"the {kind} plan of layer {index} does not have one width per head and group")


def _check_header(blob: bytes, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the file's own table of contents with the expected one before any other parser sees it."""
    if len(blob) < 8:
        raise ArtifactError(f"{TENSORS} is truncated")
    (size,) = struct.unpack("<Q", blob[:8])
    if size > min(HEADER_LIMIT, len(blob) - 8):
        raise ArtifactError(f"{TENSORS} has a header of {size} bytes, more than there can be")
    if blob[8:9] != b"{":
        raise ArtifactError(f"{TENSORS} has a header that is no JSON object")
    try:
        header = json.loads(blob[8 : 8 + size].decode(), object_pairs_hook=_unique_tensors)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{TENSORS} has no readable header ({error})") from error
    if not isinstance(header, dict) or set(header) != set(expected):
        raise ArtifactError(f"{TENSORS} does not hold exactly the tensors that the plan calls for")
    total = 0
    for name, shape in expected.items():
        entry = header[name]
        fields = {"dtype", "shape", "data_offsets"}
        if (
            not isinstance(entry, dict)
            or set(entry) != fields
            or (entry["dtype"], entry["shape"]) != ("F32", list(shape))
        ):
            raise ArtifactError(f"tensor {name} is not float32 of shape {list(shape)}")
        total += 4 * prod(shape)
    if len(blob) != 8 + size + total:
        raise ArtifactError(f"{TENSORS} has {len(blob)} bytes instead of {8 + size + total}")
    try:
        safetensors.deserialize(blob)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{TENSORS} is damaged ({error})") from error


def _unique_tensors(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ArtifactError(f"{TENSORS} names a tensor twice")
    return dict(pairs)


def _check_values(artifact: Artifact) -> None:
    """What shapes cannot say: codebooks are whole numbers and ascend, scales are not negative, frequencies are usable."""
    plans = [artifact.manifest.layers[i] for i in artifact.compressed_layers]
    for kind in ("key", "value"):
        widths = [w for plan in plans for head in getattr(plan, kind) for w in head if w]
        for group, levels in enumerate(artifact.tensors[f"{kind}.levels"].split([1 << w for w in widths])):
            if not (levels.diff() > 0).all():
                raise ArtifactError(f"codebook {group} of the {kind}s does not ascend")
            if not ((levels == levels.round()) & (levels >= LOWEST_LEVEL) & (levels <= HIGHEST_LEVEL)).all():
                raise ArtifactError(
                    f"codebook {group} of the {kind}s holds a level that is no whole number "
                    f"from {LOWEST_LEVEL} to {HIGHEST_LEVEL}"
                )
        if not (artifact.tensors[f"{kind}.sink_scale"] >= 0).all():
            raise ArtifactError(f"{kind}.sink_scale holds negative values")
    if artifact.manifest.rotary and not (artifact.tensors["rotary.inv_freq"].abs() <= torch.pi).all():
        raise ArtifactError("rotary.inv_freq turns by more than half a circle per position")

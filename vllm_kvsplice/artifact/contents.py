"""An artifact in memory: from the contents of its two files, and back."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vllm_kvsplice.artifact.manifest import BASELINE_BITS, MANIFEST, Manifest, ModelShape, Quality, parse_manifest
from vllm_kvsplice.codec import HIGHEST_LEVEL, LEVELS, LOWEST_LEVEL, KindCodec, LayerCodec
from vllm_kvsplice.errors import ArtifactError
from vllm_kvsplice.rotary import Rotary

TENSORS = "kvsplice.safetensors"
HEADER_LIMIT = 1 << 20


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
        dense = self.manifest.model.dense_layer_bytes
        return sum(layer.layout.token_bytes if layer else dense for layer in self.manifest.layers)

    @property
    def baseline_bytes_per_token(self) -> int:
        """The same for an uncompressed 16-bit cache."""
        return self.manifest.model.num_layers * self.manifest.model.dense_layer_bytes

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
        baseline = len(layers) * self.manifest.model.dense_layer_bytes
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

    def codecs_on(self, device: torch.device) -> dict[int, LayerCodec]:
        """The same with their tensors on `device`."""
        return {index: codec.to(device) for index, codec in self.codecs.items()}

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
    return parse_artifact(*serialise(manifest, tensors))


def serialise(manifest: Manifest, tensors: Mapping[str, Tensor]) -> tuple[bytes, bytes]:
    """Contents of both files; `manifest.tensors_sha256` is filled in here."""
    blob = safetensors.torch.save({name: tensor.float().contiguous() for name, tensor in tensors.items()})
    manifest = manifest.model_copy(update={"tensors_sha256": hashlib.sha256(blob).hexdigest()})
    return manifest.model_dump_json(indent=1).encode(), blob


def parse_artifact(manifest_bytes: bytes, tensor_bytes: bytes) -> Artifact:
    """Check the two files' contents; raises `ArtifactError` with the reason alone."""
    manifest = parse_manifest(manifest_bytes)
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

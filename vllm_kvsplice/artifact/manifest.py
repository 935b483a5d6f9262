"""`kvsplice.json`: what a manifest may say, and the reading of one that nobody vouches for."""

import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvsplice.errors import ArtifactError
from vllm_kvsplice.layout import GROUP, MAX_WIDTH, LayerLayout

MANIFEST = "kvsplice.json"
VERSION = 1
# Of an element of a cache that is not compressed.
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

    @property
    def dense_layer_bytes(self) -> int:
        """Bytes of a token in a layer that is not compressed."""
        return 2 * self.num_kv_heads * self.head_dim * BASELINE_BITS // 8


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
    """How the artifact came to be.

    Attributes:
        recent: W of the exact window that it was made to be read beside.
        expected_change_percent: of perplexity, by the planner.

    """

    model: str
    text: str
    text_sha256: str
    tokens: int
    context: int
    recent: Index = 0
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


def parse_manifest(text: bytes) -> Manifest:
    """A checked manifest; raises `ArtifactError` with the reason alone."""

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

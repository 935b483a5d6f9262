"""Random damage to both files: an artifact is refused with `ArtifactError`, or it is valid by an independent checker.

`fault` is that checker: the format written down a second time, in plain Python and numpy, sharing no code with the
package. KVSPLICE_FUZZ_EXAMPLES=100000 makes a long run of it; the examples of a short run are the same every time.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.artifact.samples import Draft, Files, at, files_of, frame, nodes, sample, sign
from tests.artifact.test_corruption import CASES, spoiled
from vllm_kvsplice.artifact import parse_artifact
from vllm_kvsplice.errors import ArtifactError

EXAMPLES = int(os.environ.get("KVSPLICE_FUZZ_EXAMPLES", "2000"))
BASES = {"rotary": files_of(sample()), "plain": files_of(sample(rotary=False))}

COUNT = (1, 1 << 20)
ANY = (-math.inf, math.inf)
# Fields of each object of the manifest: a type, or the range of an integer.
MODEL = dict.fromkeys(("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size"), COUNT) | {
    "model_type": str,
    "rope": str,
}
ROTARY = {"pairs": COUNT, "interleaved": bool, "skips": list}
PROVENANCE = dict.fromkeys(("model", "text", "text_sha256", "fit", "planner", "requested", "created"), str) | {
    "expected_change_percent": float,
    "tokens": ANY,
    "context": ANY,
    "recent": (0, (1 << 20) - 1),
    "seed": ANY,
    "versions": dict,
}
QUALITY = {"mode": str, "baseline_ppl": float, "ppl": float, "change_percent": float, "tokens": ANY, "context": ANY}
TOP = {"format": str, "version": (1, 1), "layers": list, "tensors_sha256": str}
DEFAULTS: dict[str, dict[str, Any]] = {"rotary": {"skips": []}, "provenance": {"recent": 0}}
OBJECTS = {"model": MODEL, "rotary": ROTARY, "provenance": PROVENANCE, "quality": QUALITY}


class Wrong(Exception):
    """The checker's verdict."""


def ensure(condition: bool, reason: str) -> None:
    if not condition:
        raise Wrong(reason)


def fault(files: Files) -> str | None:
    """What is wrong with an artifact, or None."""
    try:
        check_tensors(check_manifest(files), files.tensors)
    except (Wrong, ValueError, RecursionError, struct.error) as reason:
        return f"{type(reason).__name__} {reason}"
    return None


def strict_json(content: bytes) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        ensure(len({name for name, _ in items}) == len(items), "a name twice")
        return dict(items)

    def finite(number: str) -> float:
        ensure(math.isfinite(float(number)), "not finite")
        return float(number)

    return json.loads(content.decode("utf-8"), object_pairs_hook=pairs, parse_constant=finite, parse_float=finite)


def is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return type(value) is int and kind[0] <= value <= kind[1]
    return type(value) in ((int, float) if kind is float else (kind,))


def check_fields(value: Any, fields: dict[str, Any], name: str, others: tuple[str, ...] = ()) -> None:
    ensure(isinstance(value, dict) and set(value) == {*fields, *others}, f"fields of {name}")
    for field, kind in fields.items():
        ensure(is_a(value[field], kind), f"{name}.{field}")


def check_manifest(files: Files) -> dict[str, Any]:
    manifest = strict_json(files.manifest)
    json.dumps(manifest, ensure_ascii=False).encode()
    check_fields(manifest, TOP, "manifest", tuple(OBJECTS))
    for name, fields in OBJECTS.items():
        if manifest[name] is not None or name in ("model", "provenance"):
            if name in DEFAULTS and isinstance(manifest[name], dict):
                manifest[name] = DEFAULTS[name] | manifest[name]
            check_fields(manifest[name], fields, name)
    ensure(all(isinstance(v, str) for v in manifest["provenance"]["versions"].values()), "versions")
    ensure(manifest["format"] == "kvsplice", "format")
    ensure(manifest["quality"] is None or manifest["quality"]["mode"] in ("all", "serving"), "mode")
    ensure(manifest["tensors_sha256"] == hashlib.sha256(files.tensors).hexdigest(), "hash")
    model = manifest["model"]
    heads, dim = model["num_kv_heads"], model["head_dim"]
    ensure(dim % 8 == 0 and model["num_heads"] % heads == 0, "sizes")
    ensure(not manifest["rotary"] or manifest["rotary"]["pairs"] * 2 <= dim, "pairs")
    ensure(len(manifest["layers"]) == model["num_layers"], "number of layers")
    skips = manifest["rotary"]["skips"] if manifest["rotary"] else []
    ensure(all(is_a(layer, (0, model["num_layers"] - 1)) for layer in skips), "skips")
    ensure(all(one < other for one, other in itertools.pairwise(skips)), "skips in order")
    plans = [layer for layer in manifest["layers"] if layer is not None]
    ensure(bool(plans), "nothing compressed")
    for plan in plans:
        check_fields(plan, {"key": list, "value": list}, "layer")
        for side in plan.values():
            ensure(len(side) == heads and all(type(h) is list and len(h) == dim // 8 for h in side), "plan")
            ensure(all(is_a(width, (0, 8)) for head in side for width in head), "width")
    return manifest


def check_tensors(manifest: dict[str, Any], content: bytes) -> None:
    (size,) = struct.unpack_from("<Q", content)
    ensure(size <= min(1 << 20, len(content) - 8) and content[8:9] == b"{", "header size")
    header, data = strict_json(content[8 : 8 + size]), content[8 + size :]
    model, plans = manifest["model"], [layer for layer in manifest["layers"] if layer]
    head, dim = [len(plans), model["num_kv_heads"]], model["head_dim"]
    sizes = {s: [2**w for plan in plans for h in plan[s] for w in h if w] for s in ("key", "value")}
    shapes = {"rotary.inv_freq": [manifest["rotary"]["pairs"]]} if manifest["rotary"] else {}
    for side in ("key", "value"):
        shapes |= {f"{side}.{name}": [*head, dim] for name in ("mean", "sink", "sink_scale")}
        shapes |= {f"{side}.{name}": [*head, dim, dim] for name in ("analysis", "synthesis")}
        shapes |= {f"{side}.levels": [sum(sizes[side])]}
    ensure(isinstance(header, dict) and set(header) == set(shapes), "names")
    arrays, spans = {}, []
    for name, shape in shapes.items():
        check_fields(header[name], {"dtype": str, "shape": list, "data_offsets": list}, name)
        begin, end = header[name]["data_offsets"]
        ensure(header[name]["dtype"] == "F32", "dtype")
        ensure(header[name]["shape"] == shape and all(type(n) is int for n in header[name]["shape"]), "shape")
        ensure(type(begin) is int and type(end) is int and end - begin == 4 * math.prod(shape), "length")
        spans.append((begin, end))
        arrays[name] = np.frombuffer(data[begin:end], "<f4").astype(np.float64)
    # Laid end to end the tensors are the file: nothing overlaps, nothing is left over.
    ends = [0, *(end for _, end in sorted(spans))]
    ensure([begin for begin, _ in sorted(spans)] == ends[:-1] and ends[-1] == len(data), "offsets")
    check_numbers(arrays, sizes)


def check_numbers(arrays: dict[str, np.ndarray], sizes: dict[str, list[int]]) -> None:
    ensure(all(np.isfinite(array).all() for array in arrays.values()), "not finite")
    for side, counts in sizes.items():
        ensure((arrays[f"{side}.sink_scale"] >= 0).all(), "scales")
        start = 0
        for count in counts:
            book = arrays[f"{side}.levels"][start : start + count]
            ensure(all(low < high for low, high in itertools.pairwise(book)), "codebook")
            ensure(set(book) <= set(range(-128, 128)), "level")
            start += count
    ensure(all(abs(f) <= np.float32(math.pi) for f in arrays.get("rotary.inv_freq", [])), "frequency")


def judge(files: Files) -> None:
    """The promise: refused with `ArtifactError` (any other exception fails the test), or valid."""
    try:
        parse_artifact(*files)
    except ArtifactError:
        return
    assert fault(files) is None, fault(files)


@pytest.mark.parametrize("name", CASES)
def test_the_checker_finds_every_handmade_fault(name: str) -> None:
    assert fault(spoiled(name)) is not None


@pytest.mark.parametrize("base", BASES)
def test_the_checker_passes_valid_artifacts(base: str) -> None:
    assert fault(BASES[base]) is None
    parse_artifact(*BASES[base])


fuzz = settings(
    max_examples=EXAMPLES // 4,
    deadline=1000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
bases = st.sampled_from(sorted(BASES))
places = st.floats(0, 1, exclude_max=True)
# Floats that matter, tokens that matter to JSON, and anything.
pieces = st.one_of(
    st.sampled_from([struct.pack("<f", x) for x in (math.nan, math.inf, -math.inf, 1e38, 0.0, -0.0, 0.5, 1.0, 4.0)]),
    st.sampled_from(
        [b"NaN", b"1e999", b"-", b"null", b"{", b"]", b'"', b",", b"\\ud800", b"0", b"9", b"true", b"\xff"]
    ),
    st.binary(min_size=1, max_size=8),
)
edits = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "cut", "copy", "end"]), places, places, pieces), min_size=1, max_size=3
)
numbers = st.one_of(
    st.integers(-2, 10), st.integers(), st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**4299, -(2**63)])
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8))
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
tree_edits = st.lists(
    st.tuples(st.sampled_from(["set", "nudge", "drop", "add", "swap"]), places, places, values), min_size=1, max_size=2
)


def damaged(content: bytes, changes: list[tuple[str, float, float, bytes]], aligned: int = 1) -> bytes:
    """`content` with bytes changed at relative places, those being multiples of `aligned`."""
    for what, first, second, piece in changes:
        start, other = (int(place * len(content)) // aligned * aligned for place in (first, second))
        if what == "set":
            content = content[:start] + piece + content[start + len(piece) :]
        elif what == "insert":
            content = content[:start] + piece + content[start:]
        elif what == "cut":
            content = content[:start] + content[start + len(piece) :]
        elif what == "copy":
            content = content[:start] + content[other : other + 8] + content[start + 8 :]
        else:
            content = content[:start]
    return content


def rearranged(tree: Any, changes: list[tuple[str, float, float, Any]]) -> Any:
    """`tree` with values set, nudged by one, dropped, added or swapped."""
    for what, first, second, value in changes:
        paths = list(nodes(tree))
        if not paths:
            return value
        (*parents, key), other = paths[int(first * len(paths))], paths[int(second * len(paths))]
        holder, here = at(tree, parents), at(tree, (*parents, key))
        if what == "nudge" and isinstance(here, int):
            holder[key] = here + (1 if second < 0.5 else -1)
        elif what == "drop":
            del holder[key]
        elif what == "add":
            holder.update({str(value): here}) if isinstance(holder, dict) else holder.insert(key, value)
        elif what == "swap":
            holder[key] = copy.deepcopy(at(tree, other))
        else:
            holder[key] = value
    return tree


@fuzz
@given(bases, edits)
def test_manifest_with_damaged_bytes(base: str, changes) -> None:
    judge(Files(damaged(BASES[base].manifest, changes), BASES[base].tensors))


@fuzz
@given(bases, tree_edits)
def test_manifest_with_changed_structure(base: str, changes) -> None:
    manifest = rearranged(Draft(BASES[base]).manifest, changes)
    judge(Files(json.dumps(manifest).encode(), BASES[base].tensors))


@fuzz
@given(bases, edits, st.sampled_from([1, 4]))
def test_tensors_with_damaged_bytes_and_the_right_hash(base: str, changes, aligned: int) -> None:
    judge(sign(Draft(BASES[base]).manifest, damaged(BASES[base].tensors, changes, aligned)))


@fuzz
@given(bases, tree_edits, edits, st.booleans())
def test_tensors_with_changed_header_and_the_right_hash(base: str, changes, bytes_too, of_text: bool) -> None:
    draft = Draft(BASES[base])
    header = rearranged(draft.header, changes)
    text = damaged(json.dumps(header).encode(), bytes_too) if of_text else header
    judge(sign(draft.manifest, frame(text, bytes(draft.data))))


def test_levels_and_flags_at_random_places() -> None:
    """Single floats, where damaged bytes seldom hit: every position of the small tensors, with every kind of number."""
    draft = Draft(BASES["rotary"])
    for name in ("key.sink_scale", "value.sink_scale", "rotary.inv_freq", "value.levels"):
        array = draft.array(name)
        for index in range(0, len(array), max(1, len(array) // 16)):
            kept = array[index]
            for value in (np.nan, np.inf, -np.inf, 0.0, -0.0, 0.5, 1.0, 3.1415927, 3.1415930, -1e30):
                array[index] = value
                judge(draft.files())
            array[index] = kept

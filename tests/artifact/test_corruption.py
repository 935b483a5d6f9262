"""Invalid artifacts, each breaking one rule: every one is refused with one sentence that names what is wrong."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.artifact.samples import Draft, Files, Spoil, at, files_of, frame, nodes, sample, sign
from vllm_kvsplice import cli
from vllm_kvsplice.artifact import load_artifact, parse_artifact
from vllm_kvsplice.artifact.contents import HEADER_LIMIT
from vllm_kvsplice.errors import ArtifactError

GOOD = files_of(sample())
BLOB = GOOD.tensors
JSON = "kvsplice.json"


def put(path: str, value: Any) -> Spoil:
    """Set one value of the manifest; `path` has dots between keys and indices."""

    def spoil(draft: Draft) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        at(draft.manifest, tuple(parents))[last] = value

    return spoil


def drop(path: tuple[str, ...]) -> Spoil:
    def spoil(draft: Draft) -> None:
        del at(draft.manifest, path[:-1])[path[-1]]

    return spoil


def text(old: str, new: str) -> Spoil:
    """Replace text in the manifest's JSON."""

    def spoil(draft: Draft) -> Files:
        content = draft.files().manifest.replace(old.encode(), new.encode(), 1)
        assert content != draft.files().manifest
        return Files(content, draft.blob)

    return spoil


def whole(manifest: bytes) -> Spoil:
    """Replace the manifest."""
    return lambda draft: Files(manifest, draft.blob)


def entry(name: str, **fields: Any) -> Spoil:
    """Change one tensor's entry in the header of the tensors' file."""
    return lambda draft: draft.header[name].update(fields)


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change the header of the tensors' file; what `change` returns, if anything, takes its place."""
    return lambda draft: sign(draft.manifest, frame(change(draft.header) or draft.header, bytes(draft.data)))


def header_text(old: str, new: str) -> Spoil:
    return header(lambda fields: json.dumps(fields).replace(old, new, 1).encode())


def values(name: str, change: Callable[[np.ndarray], Any]) -> Spoil:
    """Change numbers in a tensor."""

    def spoil(draft: Draft) -> None:
        change(draft.array(name))

    return spoil


def set_at(index: int, value: float) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(index, value)


def blob(content: bytes) -> Spoil:
    """Replace the tensors' file, and sign it."""
    return lambda draft: sign(draft.manifest, content)


def unsigned(content: bytes) -> Spoil:
    """Replace the tensors' file behind the manifest's back."""
    return lambda draft: Files(draft.files().manifest, content)


def overlap(draft: Draft) -> None:
    """Two tensors of one size share their bytes; the file keeps its length."""
    draft.header["key.mean"]["data_offsets"] = draft.header["key.sink"]["data_offsets"]


def swap_ends(draft: Draft) -> None:
    draft.header["key.mean"]["data_offsets"].reverse()


def widen(draft: Draft) -> None:
    """One more tensor, with its bytes."""
    end = len(draft.data)
    draft.header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    draft.data += bytes(4)


def gap(draft: Draft) -> None:
    """Four unused bytes between the tensors, the last tensor starting after them."""
    last = max(draft.header, key=lambda name: draft.header[name]["data_offsets"])
    draft.header[last]["data_offsets"] = [offset + 4 for offset in draft.header[last]["data_offsets"]]
    draft.data += bytes(4)


def wrong_hash(value: Any) -> Spoil:
    return lambda draft: Files(json.dumps(draft.manifest | {"tensors_sha256": value}).encode(), draft.blob)


# What the manifest must not say: (where, value, what the message must contain).
MANIFEST_VALUES = [
    ("format", "gguf", "format"),
    ("format", None, "format"),
    ("version", 0, "version"),
    ("version", 2, "version"),
    ("version", -1, "version"),
    ("version", "1", "version"),
    ("version", None, "version"),
    ("version", True, "version"),
    ("version", 1.0, "version"),
    ("surplus", 1, "surplus"),
    ("model", None, "model"),
    ("model", [], "model"),
    ("model.surplus", 1, "model.surplus"),
    ("model.model_type", 7, "model.model_type"),
    ("model.rope", {"rope_theta": 1.0}, "model.rope"),
    ("model.num_layers", 0, "model.num_layers"),
    ("model.num_layers", -3, "model.num_layers"),
    ("model.num_layers", 3.0, "model.num_layers"),
    ("model.num_layers", "3", "model.num_layers"),
    ("model.num_layers", True, "model.num_layers"),
    ("model.num_layers", None, "model.num_layers"),
    ("model.num_layers", 4, "3 layers"),
    ("model.num_layers", 2, "3 layers"),
    ("model.num_heads", 3, "3 heads"),
    ("model.num_heads", (1 << 20) + 1, "model.num_heads"),
    ("model.num_kv_heads", 0, "model.num_kv_heads"),
    ("model.num_kv_heads", 3, "3 KV heads"),
    ("model.num_kv_heads", 1, "layer 0"),
    ("model.num_kv_heads", 4, "layer 0"),
    ("model.head_dim", 12, "12 dimensions"),
    ("model.head_dim", 8, "8 dimensions"),
    ("model.head_dim", 32, "layer 0"),
    ("model.head_dim", 1 << 31, "model.head_dim"),
    ("model.head_dim", 1 << 64, "model.head_dim"),
    ("model.hidden_size", -1, "model.hidden_size"),
    ("model.vocab_size", 0, "model.vocab_size"),
    ("rotary", False, "rotary"),
    ("rotary", {}, "rotary"),
    ("rotary", None, "tensors that the plan calls for"),
    ("rotary.pairs", 0, "rotary.pairs"),
    ("rotary.pairs", -8, "rotary.pairs"),
    ("rotary.pairs", 9, "9 rotary pairs"),
    ("rotary.pairs", 4, "rotary.inv_freq"),
    ("rotary.pairs", 1 << 40, "rotary.pairs"),
    ("rotary.interleaved", 0, "rotary.interleaved"),
    ("rotary.skips", 1, "rotary.skips"),
    ("rotary.skips", [-1], "rotary.skips"),
    ("rotary.skips", [True], "rotary.skips"),
    ("rotary.skips", [0, 3], "skips layers [0, 3] of 3"),
    ("rotary.skips", [1, 0], "skips layers"),
    ("rotary.skips", [1, 1], "skips layers"),
    ("rotary.interleaved", "false", "rotary.interleaved"),
    ("provenance.recent", -1, "provenance.recent"),
    ("provenance.recent", "32", "provenance.recent"),
    ("layers", [], "0 layers"),
    ("layers", None, "layers"),
    ("layers", {"0": None}, "layers"),
    ("layers", [None] * 3, "layers"),
    ("layers.0", {}, "layers.0"),
    ("layers.0", 8, "layers.0"),
    ("layers.0", None, "key"),
    ("layers.0.surplus", [], "layers.0.surplus"),
    ("layers.0.key", [], "layer 0"),
    ("layers.0.key", [[0, 8]], "layer 0"),
    ("layers.0.key", [[0, 8], [1, 3], [0, 0]], "layer 0"),
    ("layers.0.key.0", [0], "layer 0"),
    ("layers.0.key.0", [0, 8, 0], "layer 0"),
    ("layers.0.key.0", "08", "layers.0.key.0"),
    ("layers.0.key.0.0", 9, "layers.0.key.0.0"),
    ("layers.0.key.0.0", -1, "layers.0.key.0.0"),
    ("layers.0.key.0.0", 1 << 70, "layers.0.key.0.0"),
    ("layers.0.key.0.0", 2.5, "layers.0.key.0.0"),
    ("layers.0.key.0.0", "2", "layers.0.key.0.0"),
    ("layers.0.key.0.0", None, "layers.0.key.0.0"),
    ("layers.0.key.0.0", True, "layers.0.key.0.0"),
    ("layers.0.key.0.0", 1, "key.levels"),
    ("layers.2.value.1.1", 8, "value.levels"),
    ("provenance", None, "provenance"),
    ("provenance.surplus", "", "provenance.surplus"),
    ("provenance.seed", 0.5, "provenance.seed"),
    ("provenance.tokens", "many", "provenance.tokens"),
    ("provenance.versions", [], "provenance.versions"),
    ("provenance.versions.torch", 2, "provenance.versions.torch"),
    ("quality", {}, "quality"),
    ("quality.mode", "some", "quality.mode"),
    ("quality.ppl", "10", "quality.ppl"),
    ("quality.surplus", 1, "quality.surplus"),
]

# Text of the manifest that no dictionary can hold.
MANIFEST_TEXTS = {
    "empty file": (whole(b""), "not JSON"),
    "blank file": (whole(b" \n"), "not JSON"),
    "only zeros": (whole(bytes(64)), "not JSON"),
    "a list": (whole(b"[]"), "not a KVSplice manifest"),
    "a number": (whole(b"1"), "not a KVSplice manifest"),
    "null": (whole(b"null"), "not a KVSplice manifest"),
    "empty object": (whole(b"{}"), "not a KVSplice manifest"),
    "half a file": (whole(GOOD.manifest[: len(GOOD.manifest) // 2]), "not JSON"),
    "trailing text": (whole(GOOD.manifest + b"}"), "not JSON"),
    "two documents": (whole(GOOD.manifest * 2), "not JSON"),
    "not UTF-8": (whole(GOOD.manifest.replace(b"pydoc", b"pyd\xff")), "not JSON"),
    "UTF-16": (whole(GOOD.manifest.decode().encode("utf-16")), "not JSON"),
    "byte order mark": (whole(b"\xef\xbb\xbf" + GOOD.manifest), "not JSON"),
    "control character": (text("pydoc", "py\ndoc"), "not JSON"),
    "lone surrogate": (text("pydoc", "\\ud800"), JSON),
    "comment": (text("{", "{ /* hello */ "), "not JSON"),
    "single quotes": (text('"pydoc"', "'pydoc'"), "not JSON"),
    "pickle": (whole(b"\x80\x04\x95\x00\x00\x00\x00."), "not JSON"),
    "version twice": (text('"version": 1', '"version": 1, "version": 1'), "twice"),
    "width plan twice": (text('"layers": [{"key"', '"layers": [{"key": [], "key"'), "twice"),
    "NaN": (text("10.25", "NaN"), "NaN"),
    "Infinity": (text("10.25", "Infinity"), "Infinity"),
    "minus Infinity": (text("10.25", "-Infinity"), "-Infinity"),
    "overflowing figure": (text("10.25", "1e999"), "quality.ppl"),
    "overflowing size": (text('"num_layers": 3', '"num_layers": 1e999'), "model.num_layers"),
    "exponent for a size": (text('"num_layers": 3', '"num_layers": 3e0'), "model.num_layers"),
    "number of 5000 digits": (text('"num_layers": 3', f'"num_layers": {"9" * 5000}'), JSON),
    "seed of 5000 digits": (text('"seed": 0', f'"seed": {"9" * 5000}'), JSON),
    "lists 100000 deep": (whole(b"[" * 100_000), JSON),
    "objects 100000 deep": (whole(b'{"a":' * 100_000), JSON),
    "field 300 deep": (text('"seed": 0', f'"seed": {"[" * 300}{"]" * 300}'), JSON),
    "objects 300 deep": (text('"seed": 0', '"seed": ' + '{"a":' * 300 + "0" + "}" * 300), JSON),
    "name over two lines": (text('"seed": 0', '"seed": 0, "first\\nsecond": 0'), JSON),
    "name that paints": (text('"seed": 0', '"seed": 0, "\\u001b[31m": 0'), JSON),
    "name of a million letters": (text('"seed": 0', f'"seed": 0, "{"n" * 1_000_000}": 0'), JSON),
    "version of a million letters": (text('"version": 1', f'"version": "{"n" * 1_000_000}"'), "version"),
    "SHA-256 a number": (wrong_hash(5), "tensors_sha256"),
    "SHA-256 too short": (wrong_hash("0" * 63), "tensors_sha256"),
    "SHA-256 in capitals": (wrong_hash("A" * 64), "tensors_sha256"),
    "SHA-256 and a line": (wrong_hash("0" * 64 + "\n"), "tensors_sha256"),
    "SHA-256 of something else": (wrong_hash("0" * 64), "SHA-256 differs"),
}

TENSOR_FILES = {
    "SHA-256 of another file": (unsigned(files_of(sample(seed=1)).tensors), "SHA-256"),
    "unsigned bit flip": (unsigned(BLOB[:-1] + bytes([BLOB[-1] ^ 1])), "SHA-256"),
    "unsigned empty file": (unsigned(b""), "SHA-256"),
    "empty file": (blob(b""), "truncated"),
    "seven bytes": (blob(b"\0" * 7), "truncated"),
    "length alone": (blob(BLOB[:8]), "header"),
    "no header": (blob(b"\0" * 8), "header"),
    "half a header": (blob(BLOB[:100]), "header"),
    "no data": (blob(BLOB[: 8 + struct.unpack("<Q", BLOB[:8])[0]]), "bytes instead of"),
    "one byte short": (blob(BLOB[:-1]), "bytes instead of"),
    "one tensor short": (blob(BLOB[:-128]), "bytes instead of"),
    "one byte more": (blob(BLOB + b"\0"), "bytes instead of"),
    "zip": (blob(b"PK\x03\x04" + BLOB), "header"),
    "header past the end": (blob(struct.pack("<Q", len(BLOB) - 7) + BLOB[8:]), "header"),
    "header of 2^63 bytes": (blob(struct.pack("<Q", 1 << 63) + BLOB[8:]), "header"),
    "header of 2^64 - 1 bytes": (blob(b"\xff" * 8 + BLOB[8:]), "header"),
    "header over the limit": (header(lambda h: json.dumps(h).encode().ljust(HEADER_LIMIT + 1)), "header"),
    "header a byte short": (blob(struct.pack("<Q", struct.unpack("<Q", BLOB[:8])[0] // 2) + BLOB[8:]), "header"),
    "header not UTF-8": (header(lambda h: b"\xff{}"), "header"),
    "header a list": (header(lambda h: b"[]"), "tensors"),
    "header a number": (header(lambda h: b"1"), "tensors"),
    "header empty": (header(lambda h: b"{}"), "tensors"),
    "header deep": (header(lambda h: b"[" * 100_000), "tensor"),
    "header with a number of 5000 digits": (header_text('"shape": [2,', f'"shape": [{"9" * 5000},'), "tensor"),
    "header starting with a space": (header(lambda h: b" " + json.dumps(h).encode()), "tensor"),
    "header ending in zeros": (header(lambda h: json.dumps(h).encode() + b"\0" * 8), "header"),
    "metadata": (header(lambda h: h.update(__metadata__={"format": "pt"})), "tensors"),
    "metadata with a program": (header(lambda h: h.update(__metadata__={"__reduce__": "os.system"})), "tensors"),
    "missing tensor": (header(lambda h: h.__delitem__("value.levels")), "tensors"),
    "renamed tensor": (header(lambda h: h.update({"../mean": h.pop("key.mean")})), "tensors"),
    "extra tensor": (widen, "tensors"),
    "extra empty tensor": (
        header(lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
        "tensors",
    ),
    "tensor twice": (header_text("{", '{"key.mean": {}, '), "twice"),
    "shape twice": (header_text('"shape"', '"shape": [1], "shape"'), "twice"),
    "entry null": (header(lambda h: h.update({"key.mean": None})), "key.mean"),
    "entry a list": (header(lambda h: h.update({"key.mean": []})), "key.mean"),
    "entry empty": (header(lambda h: h.update({"key.mean": {}})), "key.mean"),
    "entry with a surplus field": (entry("key.mean", surplus=1), "tensor"),
    "float16": (entry("key.mean", dtype="F16"), "key.mean"),
    "int32": (entry("value.sink_scale", dtype="I32"), "value.sink_scale"),
    "unknown dtype": (entry("key.mean", dtype="f32"), "key.mean"),
    "no dtype": (entry("key.mean", dtype=None), "key.mean"),
    "flat shape": (entry("key.mean", shape=[64]), "key.mean"),
    "transposed shape": (entry("key.mean", shape=[16, 2, 2]), "key.mean"),
    "scalar shape": (entry("key.mean", shape=[]), "key.mean"),
    "extra dimension": (entry("key.mean", shape=[1, 2, 2, 16]), "key.mean"),
    "negative shape": (entry("key.mean", shape=[-2, -2, 16]), "key.mean"),
    "zero shape": (entry("key.mean", shape=[0, 1 << 62, 16]), "key.mean"),
    "shape that overflows": (entry("key.mean", shape=[1 << 32, 1 << 32, 16]), "key.mean"),
    "shape in floats": (entry("key.mean", shape=[2.0, 2, 16]), "tensor"),
    "shape in strings": (entry("key.mean", shape=["2", "2", "16"]), "key.mean"),
    "shape a number": (entry("key.mean", shape=64), "key.mean"),
    "shape of another tensor": (entry("key.levels", shape=[1]), "key.levels"),
    "overlapping offsets": (overlap, "tensor"),
    "offsets reversed": (swap_ends, "tensor"),
    "offsets with a gap": (gap, "bytes instead of"),
    "offsets negative": (entry("key.mean", data_offsets=[-256, 0]), "tensor"),
    "offsets past the end": (entry("key.mean", data_offsets=[1 << 40, (1 << 40) + 256]), "tensor"),
    "offsets in floats": (entry("key.mean", data_offsets=[0.0, 256.0]), "tensor"),
    "offsets of 2^64": (entry("key.mean", data_offsets=[1 << 64, (1 << 64) + 256]), "tensor"),
    "offsets too short": (entry("key.mean", data_offsets=[0]), "tensor"),
    "no offsets": (header(lambda h: h["key.mean"].pop("data_offsets") and None), "tensor"),
    "NaN in the mean": (values("key.mean", set_at(0, np.nan)), "key.mean"),
    "infinity in the analysis": (values("key.analysis", set_at(-1, np.inf)), "key.analysis"),
    "minus infinity in the synthesis": (values("value.synthesis", set_at(5, -np.inf)), "value.synthesis"),
    "NaN in a sink": (values("value.sink", set_at(3, np.nan)), "value.sink"),
    "NaN in a codebook": (values("key.levels", set_at(7, np.nan)), "key.levels"),
    "infinite last level": (values("value.levels", set_at(-1, np.inf)), "value.levels"),
    "NaN for a scale": (values("key.sink_scale", set_at(0, np.nan)), "key.sink_scale"),
    "NaN for a frequency": (values("rotary.inv_freq", set_at(0, np.nan)), "rotary.inv_freq"),
    "codebook descends": (values("key.levels", lambda a: a.__setitem__(slice(None), -a)), "codebook 0 of the keys"),
    "codebook has equal levels": (values("key.levels", lambda a: set_at(1, a[0])(a)), "codebook 0 of the keys"),
    "codebook has two zeros": (values("key.levels", lambda a: a.__setitem__(slice(2), [-0.0, 0.0])), "codebook 0"),
    # The values' last codebooks have 2 + 1 bits' worth of levels: 4, 2 and 2.
    "last codebook descends": (
        values("value.levels", lambda a: a.__setitem__(slice(-2, None), a[:-3:-1].copy())),
        "codebook 6 of the values",
    ),
    "level between whole numbers": (values("value.levels", lambda a: set_at(0, a[0] - 0.5)(a)), "no whole number"),
    "level too high": (values("key.levels", set_at(255, 128.0)), "no whole number from -128 to 127"),
    "level too low": (values("value.levels", set_at(0, -129.0)), "no whole number from -128 to 127"),
    "infinite scale": (values("key.sink_scale", set_at(-1, np.inf)), "key.sink_scale"),
    "negative scale": (values("value.sink_scale", set_at(0, -1)), "value.sink_scale"),
    "frequency too high": (values("rotary.inv_freq", set_at(0, 3.2)), "rotary.inv_freq"),
    "frequency too low": (values("rotary.inv_freq", set_at(7, -3.2)), "rotary.inv_freq"),
}

# What artifacts made before the field existed do without.
OPTIONAL = {("rotary", "skips"), ("provenance", "recent")}

CASES: dict[str, tuple[Spoil, str]] = {
    **{f"{path} is {value!r}": (put(path, value), word) for path, value, word in MANIFEST_VALUES},
    **{
        f"without {'.'.join(path)}": (drop(path), path[-1])
        for path in nodes(Draft(GOOD).manifest)
        if all(isinstance(key, str) for key in path)
        and path not in {("tensors_sha256",), ("provenance", "versions", "torch"), *OPTIONAL}
    },
    **{f"manifest: {name}": case for name, case in MANIFEST_TEXTS.items()},
    **{f"tensors: {name}": case for name, case in TENSOR_FILES.items()},
}


def spoiled(name: str) -> Files:
    """The files of one case."""
    draft = Draft(GOOD)
    files = CASES[name][0](draft) or draft.files()
    assert files != GOOD
    return files


def test_the_sample_survives_being_taken_apart() -> None:
    parse_artifact(*Draft(GOOD).files())


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 80


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_artifact(*spoiled(name))
    message = str(caught.value)
    assert CASES[name][1] in message
    assert message.isprintable()
    assert len(message) < 500


def test_no_depth_of_nesting_slips_between_the_parsers() -> None:
    for depth in range(10, 1200, 7):
        for opening, closing in ("[]", ('{"a":', "}")):
            nested = '"seed": ' + opening * depth + "0" + closing * depth
            with pytest.raises(ArtifactError):
                parse_artifact(*text('"seed": 0', nested)(Draft(GOOD)))


@pytest.mark.parametrize("name", ["manifest: empty file", "tensors: one byte short"])
def test_loading_names_the_directory_and_the_mending_command(name: str, tmp_path) -> None:
    spoiled(name).write(tmp_path)
    with pytest.raises(ArtifactError, match=f"kvsplice calibrate MODEL --out {tmp_path}$") as caught:
        load_artifact(tmp_path)
    assert CASES[name][1] in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "version is 2",
        "layers.0.key.0.0 is 9",
        "manifest: half a file",
        "manifest: number of 5000 digits",
        "manifest: name over two lines",
        "tensors: SHA-256 of another file",
        "tensors: header deep",
        "tensors: NaN in the mean",
    ],
)
def test_inspect_prints_one_line_and_fails(name: str, tmp_path, monkeypatch, capsys) -> None:
    spoiled(name).write(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kvsplice", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("kvsplice: ")
    assert err.count("\n") == 1


def test_inspect_as_a_process_has_no_traceback(tmp_path) -> None:
    spoiled("tensors: codebook descends").write(tmp_path)
    command = [sys.executable, "-c", "from vllm_kvsplice.cli import main; main()", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert not done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1

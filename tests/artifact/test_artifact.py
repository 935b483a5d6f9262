"""Artifacts in memory and on disk: round trips, arithmetic by hand, shares of tensor-parallel ranks, the model's shape."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MambaConfig

from tests.artifact.samples import NARROW, PROVENANCE, QUALITY, WIDE, files_of, model_config, sample
from vllm_kvsplice import cli
from vllm_kvsplice.artifact import (
    MANIFEST,
    TENSORS,
    Artifact,
    LayerPlan,
    ModelShape,
    expected_tensors,
    heads_of_rank,
    load_artifact,
    make_artifact,
    pack_levels,
    parse_artifact,
    save_artifact,
    unpack_levels,
)
from vllm_kvsplice.commands import printing
from vllm_kvsplice.errors import ArtifactError

ZERO = LayerPlan(key=((0, 0), (0, 0)), value=((0, 0), (0, 0)))
FULL = LayerPlan(key=((8, 8), (8, 8)), value=((8, 8), (8, 8)))


def same(left: Artifact, right: Artifact) -> bool:
    return (
        left.manifest == right.manifest
        and left.digest == right.digest
        and left.tensors.keys() == right.tensors.keys()
        and all(torch.equal(left.tensors[name], right.tensors[name]) for name in left.tensors)
    )


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("layers", [(WIDE, None, NARROW), (ZERO,), (FULL, FULL), (None, ZERO)], ids=range(4))
def test_loading_gives_back_what_was_saved(rotary: bool, layers, tmp_path: Path) -> None:
    artifact = sample(rotary, layers)
    assert save_artifact(artifact, tmp_path / "new" / "folder") is artifact
    assert same(load_artifact(tmp_path / "new" / "folder"), artifact)
    assert same(load_artifact(str(tmp_path / "new" / "folder")), artifact)


def test_saving_writes_two_readable_files_and_nothing_else(tmp_path: Path) -> None:
    save_artifact(sample(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [MANIFEST, TENSORS, "out"]
    # A server often runs as another user than the calibration.
    assert (tmp_path / "out").stat().st_mode & 0o555 == 0o555


def test_the_same_artifact_is_always_the_same_bytes() -> None:
    assert files_of(sample()) == files_of(sample()) == files_of(parse_artifact(*files_of(sample())))


def test_digest_is_the_hash_of_the_manifest_and_covers_the_tensors() -> None:
    artifact, files = sample(), files_of(sample())
    assert artifact.digest == hashlib.sha256(files.manifest).hexdigest()
    assert artifact.manifest.tensors_sha256 == hashlib.sha256(files.tensors).hexdigest()
    tensors = {name: tensor.clone() for name, tensor in artifact.tensors.items()}
    tensors["value.mean"][1, 1, 15] += 1
    assert make_artifact(artifact.manifest, tensors).digest != artifact.digest


def test_quality_changes_the_digest_and_nothing_else() -> None:
    artifact = sample()
    judged = artifact.with_quality(QUALITY.model_copy(update={"ppl": 11.0}))
    assert judged.digest != artifact.digest
    assert judged.manifest.quality.ppl == 11
    assert same(judged.with_quality(artifact.manifest.quality), artifact)


def test_saving_replaces_an_older_artifact(tmp_path: Path) -> None:
    save_artifact(sample(seed=1), tmp_path / "out")
    save_artifact(sample(seed=2), tmp_path / "out")
    assert same(load_artifact(tmp_path / "out"), sample(seed=2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_swap_leaves_the_older_artifact(failing: int, tmp_path: Path, monkeypatch) -> None:
    save_artifact(sample(seed=1), tmp_path / "out")
    calls, rename = [], Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == failing + 1:
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(PermissionError):
        save_artifact(sample(seed=2), tmp_path / "out")
    assert same(load_artifact(tmp_path / "out"), sample(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parts_become_contiguous_float32() -> None:
    artifact = sample()
    loose = {name: tensor.double().repeat_interleave(2, -1)[..., ::2] for name, tensor in artifact.tensors.items()}
    assert same(make_artifact(artifact.manifest, loose), artifact)


@pytest.mark.parametrize("name", sorted(sample().tensors))
def test_parts_that_do_not_fit_are_refused(name: str) -> None:
    artifact = sample()
    for wrong in ({}, {name: torch.zeros(3)}, {name: artifact.tensors[name] * torch.nan}):
        rest = {other: tensor for other, tensor in artifact.tensors.items() if other != name}
        with pytest.raises(ArtifactError):
            make_artifact(artifact.manifest, rest | wrong)


def test_sizes_worked_by_hand() -> None:
    artifact = sample()
    # Codes: (0+8 + 1+3) + (2+7 + 4+5) = 30 and (6+4 + 0+0) + (2+1 + 1+0) = 14 bytes, in steps of 16.
    assert [artifact.layer(i).layout.code_bytes for i in (0, 2)] == [30, 14]
    assert [artifact.layer(i).layout.token_bytes for i in (0, 2)] == [32, 16]
    # A dense layer: keys and values of 2 heads of 16 elements of 2 bytes are 128 bytes.
    assert artifact.baseline_bytes_per_token == 384
    assert artifact.bytes_per_token == 32 + 128 + 16
    # 176 bytes are 1408 bits for 3 * 64 elements.
    assert artifact.bits_per_element == pytest.approx(1408 / 192)
    assert artifact.compressed_layers == [0, 2]


@pytest.mark.parametrize(
    ("layers", "size", "bits"),
    [
        # Even a layer without bits has pages.
        ((ZERO,), 16, 2),
        ((FULL,), 64, 8),
        ((FULL, None), 64 + 128, 12),
        ((NARROW, NARROW, None, None), 16 + 16 + 256, 9),
    ],
)
def test_sizes_of_other_plans(layers, size: int, bits: float) -> None:
    artifact = sample(layers=layers)
    assert (artifact.bytes_per_token, artifact.bits_per_element) == (size, bits)


def test_expected_tensors_worked_by_hand() -> None:
    assert expected_tensors(sample().manifest) == {
        "key.mean": (2, 2, 16),
        "key.sink": (2, 2, 16),
        "key.analysis": (2, 2, 16, 16),
        "key.synthesis": (2, 2, 16, 16),
        "key.sink_scale": (2, 2, 16),
        # 2^8 + 2^1 + 2^3 + 2^6 + 2^4, and nothing for three groups of no bits.
        "key.levels": (346,),
        "value.mean": (2, 2, 16),
        "value.sink": (2, 2, 16),
        "value.analysis": (2, 2, 16, 16),
        "value.synthesis": (2, 2, 16, 16),
        "value.sink_scale": (2, 2, 16),
        # 2^2 + 2^7 + 2^4 + 2^5 + 2^2 + 2^1 + 2^1.
        "value.levels": (188,),
        "rotary.inv_freq": (8,),
    }


def test_codebooks_lie_end_to_end() -> None:
    levels = torch.stack([torch.arange(256.0) + 1000 * group for group in range(4)]).view(1, 2, 2, 256)
    widths = [((1, 0), (2, 8))]
    packed = pack_levels(levels, widths)
    assert packed[:6].tolist() == [0, 1, 2000, 2001, 2002, 2003]
    assert packed[6:].tolist() == list(range(3000, 3256))
    restored = unpack_levels(packed, widths)[0]
    assert restored[0, 0].tolist() == [0] + [1] * 255
    assert restored[0, 1].tolist() == [0] * 256
    assert restored[1, 0].tolist() == [2000, 2001, 2002] + [2003] * 253
    assert torch.equal(restored[1, 1], levels[0, 1, 1])
    assert torch.equal(pack_levels(restored[None], widths), packed)


def test_a_layer_gets_its_own_row() -> None:
    artifact = sample()
    for row, index in enumerate(artifact.compressed_layers):
        codec = artifact.layer(index)
        for kind, half in (("key", codec.key), ("value", codec.value)):
            for name in ("mean", "analysis", "synthesis", "sink", "sink_scale"):
                assert torch.equal(getattr(half, name), artifact.tensors[f"{kind}.{name}"][row])
    # Layer 2 comes after the 2^8 + 2 + 2^3 levels of layer 0.
    assert torch.equal(artifact.layer(2).key.levels[0, 0, :64], artifact.tensors["key.levels"][266:330])


@pytest.mark.parametrize(("rotary", "interleaved"), [(True, False), (True, True), (False, None)])
def test_rotation_follows_the_manifest(rotary: bool, interleaved: bool | None) -> None:
    artifact = sample(rotary)
    if rotary:
        shape = artifact.manifest.rotary.model_copy(update={"interleaved": interleaved})
        artifact = make_artifact(artifact.manifest.model_copy(update={"rotary": shape}), artifact.tensors)
        assert artifact.layer(0).rotary.interleaved is interleaved
        assert torch.equal(artifact.layer(0).rotary.inv_freq, artifact.tensors["rotary.inv_freq"])
        assert shape.skips == (2,)
        assert artifact.layer(2).rotary is None
    else:
        assert artifact.layer(0).rotary is None


def test_loading_does_not_depend_on_the_default_dtype(tmp_path: Path) -> None:
    save_artifact(sample(), tmp_path / "out")
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = load_artifact(tmp_path / "out")
        codec = loaded.layer(0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(loaded, sample())
    assert torch.equal(codec.key.levels, sample().layer(0).key.levels)


@pytest.mark.parametrize(
    ("heads", "ranks", "shares"),
    [
        (2, 1, [[0, 1]]),
        (2, 2, [[0], [1]]),
        (9, 3, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 3, [[0], [0], [0]]),
    ],
)
def test_heads_of_ranks_as_in_vllm(heads: int, ranks: int, shares: list[list[int]]) -> None:
    assert [heads_of_rank(heads, rank, ranks) for rank in range(ranks)] == shares


@pytest.mark.parametrize(
    ("layer", "ranks", "code_bytes", "token_bytes"),
    [
        (0, 1, [30], 32),
        # Head 0: 0+8 + 2+7, head 1: 1+3 + 4+5. Both ranks take the larger one's pages.
        (0, 2, [17, 13], 32),
        (0, 4, [17, 17, 13, 13], 32),
        (2, 2, [13, 1], 16),
    ],
)
def test_ranks_share_heads_and_agree_on_pages(layer: int, ranks: int, code_bytes: list[int], token_bytes: int) -> None:
    artifact = sample()
    shards = [artifact.layer_shard(layer, rank, ranks) for rank in range(ranks)]
    assert [shard.layout.code_bytes for shard in shards] == code_bytes
    assert {shard.layout.token_bytes for shard in shards} == {token_bytes}
    for rank, shard in enumerate(shards):
        heads = heads_of_rank(2, rank, ranks)
        for kind in ("key", "value"):
            whole, part = getattr(artifact.layer(layer), kind), getattr(shard, kind)
            assert all(torch.equal(vars(part)[name], tensor[heads]) for name, tensor in vars(whole).items())


def test_ranks_together_store_what_one_would() -> None:
    torch.manual_seed(0)
    key, value, positions = torch.randn(5, 2, 16), torch.randn(5, 2, 16), torch.tensor([0, 1, 2, 7, 100])
    artifact = sample()
    together = artifact.layer(0).reconstruct(key, value, positions)
    for rank in range(2):
        alone = artifact.layer_shard(0, rank, 2).reconstruct(key[:, [rank]], value[:, [rank]], positions)
        assert all(torch.equal(part, whole[:, [rank]]) for part, whole in zip(alone, together, strict=True))


def test_the_model_it_was_made_for_is_accepted() -> None:
    sample().check_model(model_config())
    sample(rotary=False).check_model(model_config(rope_parameters=None))
    sample().check_model(model_config(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}))
    sample().check_model(model_config(head_dim=None))


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"model_type": "mistral"}, "model_type llama instead of mistral"),
        ({"num_hidden_layers": 4}, "num_layers 3 instead of 4"),
        ({"num_attention_heads": 8}, "num_heads 4 instead of 8"),
        ({"num_key_value_heads": 4}, "num_kv_heads 2 instead of 4"),
        ({"num_key_value_heads": None}, "num_kv_heads 2 instead of 4"),
        ({"head_dim": 32}, "head_dim 16 instead of 32"),
        ({"hidden_size": 128}, "hidden_size 64 instead of 128"),
        ({"vocab_size": 101}, "vocab_size 100 instead of 101"),
        ({"rope_parameters": None}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "500000.0"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, "linear"),
        ({"vocab_size": 101, "hidden_size": 128}, "hidden_size 64 instead of 128, vocab_size 100 instead of 101"),
    ],
)
def test_another_model_is_refused_by_field_and_with_the_way_out(changes, detail: str) -> None:
    with pytest.raises(ArtifactError, match=r"kvsplice calibrate MODEL --out DIR$") as caught:
        sample().check_model(model_config(**changes))
    assert detail in str(caught.value)


def test_a_model_without_attention_heads_is_refused() -> None:
    with pytest.raises(ArtifactError):
        sample().check_model(MambaConfig())


def test_shape_of_a_real_configuration() -> None:
    config = LlamaConfig(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, vocab_size=100
    )
    shape = ModelShape.of(config)
    assert shape.head_dim == 16
    assert '"rope_theta": 10000.0' in shape.rope
    sample().check_model(config)


@pytest.mark.parametrize("words", ["plain", "[b]", "[/b]", "/data/[corpus]/a.txt", "two\nlines"])
def test_inspect_prints_provenance_as_it_is(words: str, tmp_path: Path, monkeypatch, capsys) -> None:
    artifact = sample()
    provenance = PROVENANCE.model_copy(update={"model": words})
    changed = make_artifact(artifact.manifest.model_copy(update={"provenance": provenance}), artifact.tensors)
    save_artifact(changed, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["kvsplice", "inspect", str(tmp_path / "out")])
    monkeypatch.setattr(printing.console, "width", 200)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(line in shown for line in words.splitlines())
    assert "7.333 bits per element" in shown

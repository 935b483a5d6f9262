"""Artifacts on the Hub: what a push uploads, and that the name then stands for the artifact. The Hub is one of our own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from benchmarks.server import free_port
from tests.artifact.samples import QUALITY, sample
from tests.huggingface.hub import TOKEN, FakeHub, running_hub
from vllm_kvsplice.artifact import CARD, MANIFEST, TENSORS, load_artifact, save_artifact
from vllm_kvsplice.card import model_card
from vllm_kvsplice.cli import app
from vllm_kvsplice.errors import ArtifactError, KVSpliceError
from vllm_kvsplice.hub import from_pretrained, push_to_hub

NAME = "someone/an-artifact"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def run(*arguments: object) -> str:
    """Output of `kvsplice` with these arguments; raises what it raises."""
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).output


def test_what_is_pushed_is_found_again_by_its_name(hub: FakeHub, tmp_path: Path) -> None:
    artifact = save_artifact(sample(), tmp_path / "artifact")
    assert run("push", tmp_path / "artifact", NAME, "--private").strip().endswith(f"{hub.url}/{NAME}")
    files = hub.repositories[NAME]
    assert set(files) == {MANIFEST, TENSORS, CARD}
    for name in (MANIFEST, TENSORS):
        assert files[name] == (tmp_path / "artifact" / name).read_bytes()
    assert files[CARD].decode() == model_card(artifact, NAME)
    assert hub.private == {NAME: True}
    assert hub.messages == [f"KVSplice artifact {artifact.digest[:12]}"]
    assert artifact.digest[:16] in run("inspect", NAME)
    assert from_pretrained(NAME).digest == artifact.digest


def test_a_second_push_replaces_the_first(hub: FakeHub) -> None:
    for seed in (0, 1):
        push_to_hub(sample(seed=seed), NAME)
    assert from_pretrained(NAME).digest == sample(seed=1).digest
    assert hub.private == {NAME: False}


def test_who_may_not_push_is_told_to_log_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(
        KVSpliceError, match=r"cannot push to someone/an-artifact \(.*401.*\); log in with: hf auth login"
    ):
        push_to_hub(sample(), NAME)
    assert not hub.repositories


def test_a_hub_that_does_not_answer_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(KVSpliceError, match="cannot push to someone/an-artifact"):
        push_to_hub(sample(), NAME)


def test_what_is_no_artifact_is_not_pushed(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"kvsplice\.json is missing"):
        push_to_hub(tmp_path, NAME)
    assert not hub.repositories


class TestCard:
    def test_metadata_are_what_the_hub_reads(self) -> None:
        data = ModelCard(model_card(sample(), NAME)).data
        assert data.base_model == "a/model"
        assert data.pipeline_tag == "text-generation"
        assert {"kvsplice", "vllm"} <= set(data.tags)

    def test_a_directory_is_no_base_model(self) -> None:
        artifact = sample()
        origin = artifact.manifest.provenance.model_copy(update={"model": "my-model"})
        local = artifact.manifest.model_copy(update={"provenance": origin})
        assert ModelCard(model_card(type(artifact)(local, artifact.tensors, "0"), NAME)).data.base_model is None

    def test_it_says_what_the_artifact_costs_and_comes_from(self) -> None:
        artifact = sample()
        card = model_card(artifact, NAME)
        for text in (
            f"{artifact.bits_per_element:.2f} bits per element",
            f"| bytes per token | {artifact.baseline_bytes_per_token} | {artifact.bytes_per_token} (",
            "| layers compressed | | 2 of 3 |",
            "| perplexity | 10.000 | 10.250 (+2.50 %) |",
            f"{QUALITY.tokens} tokens that were not calibrated on",
            f"kvsplice serve a/model {NAME}",
            "pydoc, 16384 tokens in windows of 1024, seed 0",
            "torch 2.13.0",
            artifact.digest,
        ):
            assert text in card

    def test_quality_that_was_not_measured_is_not_claimed(self) -> None:
        artifact = sample()
        unjudged = type(artifact)(artifact.manifest.model_copy(update={"quality": None}), artifact.tensors, "0")
        assert "Its quality was not measured." in model_card(unjudged, NAME)
        assert "perplexity" not in model_card(unjudged, NAME)


class TestDirectoriesWithACard:
    def test_they_load_and_are_replaced(self, tmp_path: Path) -> None:
        artifact = save_artifact(sample(), tmp_path / "artifact")
        (tmp_path / "artifact" / CARD).write_text("of an earlier one")
        assert load_artifact(tmp_path / "artifact").digest == artifact.digest
        other = save_artifact(sample(seed=1), tmp_path / "artifact")
        assert load_artifact(tmp_path / "artifact").digest == other.digest
        assert not (tmp_path / "artifact" / CARD).exists()

    def test_other_files_are_still_not_overwritten(self, tmp_path: Path) -> None:
        save_artifact(sample(), tmp_path / "artifact")
        (tmp_path / "artifact" / "notes.md").write_text("mine")
        with pytest.raises(ArtifactError, match="is no artifact"):
            save_artifact(sample(), tmp_path / "artifact")


def test_an_artifact_in_memory_is_taken_as_it_is(tmp_path: Path) -> None:
    artifact = save_artifact(sample(), tmp_path / "artifact")
    assert from_pretrained(artifact) is artifact
    for source in (tmp_path / "artifact", str(tmp_path / "artifact")):
        assert from_pretrained(source).digest == artifact.digest
    (tmp_path / "artifact").rename(tmp_path / "kvsplice")
    assert from_pretrained(None, str(tmp_path)).digest == artifact.digest

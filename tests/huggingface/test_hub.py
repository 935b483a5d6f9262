"""Artifacts on the Hub: what a push uploads, and that the name then stands for the artifact. The Hub is one of our own."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from benchmarks.server import kvsplice_command
from tests.artifact.samples import QUALITY, sample
from tests.huggingface.hub import TOKEN, FakeHub, running_hub
from vllm_kvsplice.artifact import CARD, MANIFEST, TENSORS, load_artifact, save_artifact
from vllm_kvsplice.card import model_card
from vllm_kvsplice.errors import ArtifactError
from vllm_kvsplice.hub import from_pretrained

NAME = "someone/an-artifact"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def kvsplice(hub: FakeHub, tmp_path: Path):
    """Run `kvsplice` against the fake Hub; returns its status, standard output and standard error."""

    def run(*arguments: str | Path, token: str = TOKEN, endpoint: str | None = None) -> tuple[int, str, str]:
        # In a process of its own, because the Hub's client reads these when it is imported.
        settings = {"HF_ENDPOINT": endpoint or hub.url, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "home")}
        environment = os.environ | settings | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            kvsplice_command(*arguments), env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_what_is_pushed_is_found_again_by_its_name(hub: FakeHub, kvsplice, tmp_path: Path) -> None:
    artifact = save_artifact(sample(), tmp_path / "artifact")
    status, output, errors = kvsplice("push", tmp_path / "artifact", NAME, "--private")
    assert status == 0, errors
    assert output.strip().endswith(NAME)
    files = hub.repositories[NAME]
    assert set(files) == {MANIFEST, TENSORS, CARD}
    for name in (MANIFEST, TENSORS):
        assert files[name] == (tmp_path / "artifact" / name).read_bytes()
    assert files[CARD].decode() == model_card(artifact, NAME)
    assert hub.private == {NAME: True}
    assert hub.messages == [f"KVSplice artifact {artifact.digest[:12]}"]

    status, output, errors = kvsplice("inspect", NAME)
    assert status == 0, errors
    assert artifact.digest[:16] in output


def test_mistakes_end_in_one_sentence(hub: FakeHub, kvsplice, tmp_path: Path) -> None:
    save_artifact(sample(), tmp_path / "artifact")
    cases = [
        (tmp_path / "artifact", {"token": "hf_of_somebody_else"}, "hf auth login"),
        (tmp_path / "artifact", {"endpoint": "http://127.0.0.1:9"}, "cannot push to someone/an-artifact"),
        (tmp_path, {}, "kvsplice.json is missing"),
    ]
    for directory, options, message in cases:
        status, output, errors = kvsplice("push", directory, NAME, **options)
        assert (status, output) == (1, "")
        assert message in errors
        assert len(errors.strip().splitlines()) == 1
    assert not hub.repositories.get(NAME)


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

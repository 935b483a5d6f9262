"""From vLLM's options to an artifact: what is accepted, and what each mistake is answered with."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from tests.artifact.samples import files_of, sample
from vllm_kvsplice.artifact import save_artifact
from vllm_kvsplice.engines import ENGINES, default_engine
from vllm_kvsplice.errors import ArtifactError, KVSpliceError
from vllm_kvsplice.hub import locate_artifact
from vllm_kvsplice.serving.settings import Settings, open_artifact, read_settings


@pytest.mark.parametrize("config", [None, {}, {"kvsplice": {}}, {"others": {"artifact": 3}}])
def test_everything_has_a_default(config: Any) -> None:
    assert read_settings(config) == Settings(artifact=None, engine=default_engine(), digest=None)


def test_settings_are_read() -> None:
    section = {"artifact": "some/where", "engine": "reference", "recent_window": 7, "prefill": "exact", "digest": "abc"}
    assert read_settings({"kvsplice": section, "other": 1}) == Settings(**section)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"artefact": "x"}, ["kvsplice.artefact", "it takes artifact, engine, recent_window, prefill"]),
        ({"": 1}, ["it takes artifact, engine"]),
        ({"artifact": 3}, ["kvsplice.artifact", "string"]),
        ({"artifact": ["x"]}, ["kvsplice.artifact", "string"]),
        ({"engine": None}, ["kvsplice.engine", "string"]),
        ({"digest": 7}, ["kvsplice.digest", "string"]),
        ({"engine": "warp"}, ["engine 'warp' is unknown", *ENGINES]),
        ({"engine": ""}, ["engine '' is unknown", *ENGINES]),
        ({"recent_window": -1}, ["kvsplice.recent_window", "greater than or equal to 0"]),
        ({"recent_window": 1 << 30}, ["kvsplice.recent_window", "less than or equal"]),
        ({"recent_window": "many"}, ["kvsplice.recent_window", "integer"]),
        ({"prefill": "dense"}, ["kvsplice.prefill", "'stored' or 'exact'"]),
        (None, ["wrong at kvsplice:", "it takes artifact, engine"]),
        ([], ["wrong at kvsplice:"]),
        ("some/where", ["wrong at kvsplice:"]),
    ],
)
def test_mistakes_are_answered_with_the_choices(section: Any, words: list[str]) -> None:
    with pytest.raises(KVSpliceError) as caught:
        read_settings({"kvsplice": section})
    message = str(caught.value)
    assert all(word in message for word in words)
    assert message.isprintable()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings({}).digest = "x"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> dict[str, Any]:
    """A stand-in for the Hub: `answer` is the snapshot or the error; what was asked is kept."""
    exchange: dict[str, Any] = {"answer": LocalEntryNotFoundError("offline")}

    def download(repository: str, allow_patterns: str) -> str:
        exchange["asked"] = (repository, allow_patterns)
        if isinstance(exchange["answer"], Exception):
            raise exchange["answer"]
        return str(exchange["answer"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return exchange


def test_a_path_is_taken_as_it_is(model: Path, hub) -> None:
    (model / "kvsplice").mkdir()
    assert locate_artifact(str(model), "any/model") == model
    assert "asked" not in hub


def test_the_model_may_hold_its_artifact(model: Path, hub) -> None:
    (model / "kvsplice").mkdir()
    assert locate_artifact(None, str(model)) == model / "kvsplice"
    assert "asked" not in hub


def test_a_model_without_artifact_is_answered_with_the_command(model: Path, hub) -> None:
    with pytest.raises(ArtifactError) as caught:
        locate_artifact(None, str(model))
    assert str(caught.value).endswith(f"make one with: kvsplice calibrate {model} --out {model}/kvsplice")
    assert "asked" not in hub


def test_the_hub_is_asked_for_no_more_than_the_artifact(tmp_path: Path, hub) -> None:
    hub["answer"] = tmp_path
    (tmp_path / "kvsplice").mkdir()
    assert locate_artifact("someone/artifact", "some/model") == tmp_path
    assert hub["asked"] == ("someone/artifact", ["kvsplice.json", "kvsplice.safetensors"])
    assert locate_artifact(None, "some/model") == tmp_path / "kvsplice"
    assert hub["asked"] == ("some/model", ["kvsplice/kvsplice.json", "kvsplice/kvsplice.safetensors"])


def test_a_repository_without_artifact_is_answered_with_the_command(tmp_path: Path, hub) -> None:
    hub["answer"] = tmp_path
    with pytest.raises(
        ArtifactError, match=r"some/model holds no artifact; .* kvsplice calibrate some/model --out DIR$"
    ):
        locate_artifact(None, "some/model")


@pytest.mark.parametrize("artifact", [None, "no/where", "", "a path/with spaces", "nul\0byte"])
@pytest.mark.parametrize("error", [LocalEntryNotFoundError("x"), HFValidationError("x"), OSError("x")], ids=repr)
def test_what_cannot_be_found_is_answered_with_the_command(artifact: str | None, error: Exception, hub) -> None:
    hub["answer"] = error
    with pytest.raises(ArtifactError, match=r"kvsplice calibrate some/model --out DIR$"):
        locate_artifact(artifact, "some/model")


@pytest.mark.parametrize(
    "artifact", ["", "a path/with spaces", "../../no/such", "/no/such/path", "x" * 5000, "nul\0byte"]
)
def test_the_real_hub_client_is_not_asked_for_nonsense(artifact: str) -> None:
    with pytest.raises(ArtifactError, match="kvsplice calibrate"):
        locate_artifact(artifact, "some/model")


def test_opening_insists_on_the_digest(tmp_path: Path) -> None:
    artifact = save_artifact(sample(), tmp_path / "out")
    assert open_artifact(tmp_path / "out", None).digest == artifact.digest
    assert open_artifact(tmp_path / "out", artifact.digest).digest == artifact.digest
    for other in ("0" * 64, artifact.digest[:16], ""):
        with pytest.raises(
            ArtifactError, match=r"changed while the server was starting, so start it again; or .*digest"
        ):
            open_artifact(tmp_path / "out", other)


def test_opening_reads_a_process_wide_copy(tmp_path: Path) -> None:
    artifact = save_artifact(sample(), tmp_path / "out")
    first = open_artifact(tmp_path / "out", artifact.digest)
    files_of(sample(seed=1)).write(tmp_path / "out")
    assert open_artifact(tmp_path / "out", artifact.digest) is first
    with pytest.raises(ArtifactError, match="changed while"):
        open_artifact(tmp_path / "out", artifact.digest[::-1])

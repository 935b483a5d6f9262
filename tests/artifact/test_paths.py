"""Games with paths: what is not two plain files of sane size inside the directory is refused, and at once."""

import errno
import os
import time
from pathlib import Path

import pytest

from tests.artifact.samples import Files, files_of, sample
from vllm_kvsplice.artifact import MANIFEST, TENSORS, load_artifact, save_artifact
from vllm_kvsplice.artifact.files import MANIFEST_LIMIT, TENSORS_LIMIT
from vllm_kvsplice.errors import ArtifactError

GOOD = files_of(sample())
OTHER = files_of(sample(seed=1))
NAMES = (MANIFEST, TENSORS)

# Should an open or read ever block, only its test fails.
pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good artifact."""
    GOOD.write(tmp_path / "artifact")
    return tmp_path / "artifact"


def refusal(directory: Path) -> str:
    """The message with which loading fails, within a second and with every file closed again."""
    opened, start = len(os.listdir("/proc/self/fd")), time.monotonic()
    with pytest.raises(ArtifactError) as caught:
        load_artifact(directory)
    assert time.monotonic() - start < 1
    assert len(os.listdir("/proc/self/fd")) == opened
    message = str(caught.value)
    assert message.isprintable()
    assert "kvsplice calibrate" in message
    return message


def in_place_of(path: Path, target: Path | str) -> None:
    """Replace a file by a link."""
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [True, False])
def test_link_out_is_refused(folder: Path, name: str, relative: bool) -> None:
    outside = folder.parent / "outside"
    GOOD.write(outside)
    in_place_of(folder / name, Path("..", "outside", name) if relative else outside / name)
    assert f"{name} is a link out" in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "/proc/self/environ", "/etc/passwd"])
def test_link_to_what_is_no_artifact_is_refused(folder: Path, name: str, target: str) -> None:
    in_place_of(folder / name, target)
    assert name in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_dangling_and_circular_links_are_refused(folder: Path, name: str) -> None:
    in_place_of(folder / name, "nowhere")
    assert f"{name} is missing" in refusal(folder)
    in_place_of(folder / name, name)
    assert f"{name} cannot be read" in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_link_inside_is_accepted(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "content")
    (folder / name).symlink_to("content")
    assert load_artifact(folder).digest == sample().digest


def test_link_to_the_directory_is_accepted(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert load_artifact(link).digest == sample().digest


def hub_cache(root: Path, inner: str) -> Path:
    """A Hugging Face cache: `snapshots/COMMIT/[inner]` holds links into `blobs`. Returns the artifact's directory."""
    repository = root / "models--someone--artifact"
    GOOD.write(repository / "blobs")
    snapshot = repository / "snapshots" / "0123abc" / inner
    snapshot.mkdir(parents=True)
    for name in NAMES:
        (snapshot / name).symlink_to(os.path.relpath(repository / "blobs" / name, snapshot))
    return snapshot


@pytest.mark.parametrize("inner", ["", "kvsplice", "deep/kvsplice", "snapshots"])
def test_links_of_the_hub_cache_are_accepted(tmp_path: Path, inner: str) -> None:
    if inner == "snapshots":
        # A cache that itself lies below a folder of that name.
        tmp_path, inner = tmp_path / "snapshots", ""
    assert load_artifact(hub_cache(tmp_path, inner)).digest == sample().digest


def test_links_from_the_hub_cache_to_elsewhere_are_refused(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, "")
    GOOD.write(tmp_path / "models--someone--else" / "blobs")
    GOOD.write(tmp_path / "blobs")
    GOOD.write(snapshot.parent / "another")
    for elsewhere in ("models--someone--else/blobs", "blobs", "models--someone--artifact/snapshots/another"):
        in_place_of(snapshot / TENSORS, tmp_path / elsewhere / TENSORS)
        assert "link out" in refusal(snapshot)


@pytest.mark.parametrize("name", NAMES)
def test_fifo_is_refused_without_waiting(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is not a regular file" in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_directory_in_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in refusal(folder)


@pytest.mark.parametrize(("name", "limit"), [(MANIFEST, MANIFEST_LIMIT), (TENSORS, TENSORS_LIMIT)])
def test_oversize_file_is_refused_unread(folder: Path, name: str, limit: int) -> None:
    os.truncate(folder / name, limit + 1)
    assert f"{name} has {limit + 1} bytes" in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_unreadable_file_is_named(folder: Path, name: str, monkeypatch) -> None:
    """By a stand-in for `os.open`, because root may read everything."""
    real = os.open

    def deny(path, *arguments, **options):
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", deny)
    assert f"{name} cannot be read" in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_failing_disk_is_refused(folder: Path, name: str, monkeypatch) -> None:
    real = os.open

    def fail(path: Path, *arguments, **options):
        if os.fspath(path).endswith(name):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    assert f"{name} cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    "where",
    ["nowhere", "file", "file/below", "x" * 300, "x/" * 3000, "nul\0byte"],
    ids=["missing", "file", "below a file", "long name", "long path", "nul byte"],
)
def test_what_is_no_directory_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    start = time.monotonic()
    with pytest.raises(ArtifactError, match="there is no artifact at"):
        load_artifact(tmp_path / where)
    assert time.monotonic() - start < 1


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    assert f"{MANIFEST} is missing" in refusal(tmp_path)


def test_halves_of_two_artifacts_are_refused(folder: Path) -> None:
    Files(GOOD.manifest, OTHER.tensors).write(folder)
    assert "SHA-256" in refusal(folder)


def after_reading(monkeypatch, name: str, change) -> None:
    """Let `change()` happen just before `name` is opened."""
    real = os.open

    def open_late(path, *arguments, **options):
        if Path(path).name == name:
            change()
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_late)


def test_artifact_swapped_between_its_files_is_refused(folder: Path, monkeypatch) -> None:
    after_reading(monkeypatch, TENSORS, lambda: OTHER.write(folder))
    assert "SHA-256" in refusal(folder)


def test_file_swapped_for_a_link_after_it_was_resolved_is_refused(folder: Path, monkeypatch) -> None:
    GOOD.write(folder.parent / "outside")
    after_reading(monkeypatch, TENSORS, lambda: in_place_of(folder / TENSORS, folder.parent / "outside" / TENSORS))
    assert f"{TENSORS} cannot be read" in refusal(folder)


@pytest.mark.parametrize("size", [0, 100, len(GOOD.tensors) - 1, len(GOOD.tensors) + 1])
def test_file_resized_while_open_is_refused(folder: Path, size: int, monkeypatch) -> None:
    real = os.fstat

    def resize(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        if found.st_size == len(GOOD.tensors):
            os.truncate(folder / TENSORS, size)
        return found

    monkeypatch.setattr(os, "fstat", resize)
    assert "SHA-256" in refusal(folder)


@pytest.mark.parametrize("stranger", ["notes.txt", ".git", "kvsplice.json.bak", MANIFEST.upper()])
def test_saving_spares_a_directory_with_other_files(folder: Path, stranger: str) -> None:
    (folder / stranger).write_text("precious")
    with pytest.raises(ArtifactError, match=r"is no artifact; choose another --out directory$"):
        save_artifact(sample(seed=1), folder)
    assert (folder / stranger).read_text() == "precious"
    assert load_artifact(folder).digest == sample().digest


def test_saving_spares_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("precious")
    with pytest.raises(ArtifactError, match="is no artifact"):
        save_artifact(sample(), tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_text() == "precious"


@pytest.mark.parametrize("name", NAMES)
def test_full_disk_leaves_everything_as_it_was(folder: Path, name: str, monkeypatch) -> None:
    real = Path.write_bytes

    def fill_up(path: Path, content: bytes) -> int:
        if path.name == name:
            real(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(OSError, match="No space left"):
            save_artifact(sample(seed=1), target)
    monkeypatch.undo()
    assert os.listdir(folder.parent) == ["artifact"]
    assert load_artifact(folder).digest == sample().digest


def test_interruption_leaves_everything_as_it_was(folder: Path, monkeypatch) -> None:
    def interrupt(path: Path, content: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(sample(seed=1), folder)
    assert os.listdir(folder.parent) == ["artifact"]
    assert load_artifact(folder).digest == sample().digest

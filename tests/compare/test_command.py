"""`kvsplice compare` as a user types it, on a tiny model."""

import csv
import json
from pathlib import Path

import pytest

from tests.models import TEXT, tiny_model
from tests.test_cli import run
from vllm_kvsplice.errors import KVSpliceError

SMALL = ("--context", 64, "--windows", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    tiny_model("llama", folder / "model")
    (folder / "judge.txt").write_text(TEXT[:20_000])
    (folder / "fit.txt").write_text(TEXT[20_000:])
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> str:
    """What a whole comparison prints; its files lie in `folder`."""
    texts = ("--text", folder / "judge.txt", "--fit-text", folder / "fit.txt", "--tokens", 1024)
    files = ("--json", folder / "out/rows.json", "--csv", folder / "out/rows.csv", "--plot", folder / "plots")
    return run("compare", folder / "model", *texts, *SMALL, *files)


def test_rows_are_written_in_both_forms(folder: Path, words: str) -> None:
    rows = json.loads((folder / "out/rows.json").read_text())
    with (folder / "out/rows.csv").open() as opened:
        table = list(csv.DictReader(opened))
    assert [row["method"] for row in rows] == [row["method"] for row in table]
    for row, line in zip(rows, table, strict=True):
        assert {"method", "bits_per_element", "ppl", "change_percent"} <= row.keys()
        assert row["change_percent"] == pytest.approx(100 * (row["ppl"] / row["baseline_ppl"] - 1), abs=1e-6)
        assert float(line["ppl"]) == pytest.approx(row["ppl"])
        assert row["method"] in words


def test_ours_and_truncated_rank_are_fitted_at_all_sizes(folder: Path, words: str) -> None:
    rows = {row["method"]: row for row in json.loads((folder / "out/rows.json").read_text())}
    # Sizes go in steps of 16 bytes a layer, a third of a bit here.
    sizes = {name: round(row["bits_per_element"], 2) for name, row in rows.items() if row["family"] == "KVSplice"}
    assert sizes == {f"KVSplice {b:g} bits": s for b, s in zip((2, 2.5, 3, 3.5, 4, 5, 6, 8), SIZES, strict=True)}
    assert [row["bits_per_element"] for row in rows.values() if row["family"] == "rank"] == [2, 4, 8, 12]
    assert "KVSplice 4 bits: a peer as good takes" in words


SIZES = (2, 2.33, 3, 3.33, 4, 5, 6, 8)


def test_pictures_need_nothing_else(folder: Path, words: str) -> None:
    assert (folder / "plots/comparison.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (folder / "plots/comparison.html").read_text()
    assert "turboquant_3bit_nc" in page
    assert 'src="http' not in page


def test_artifacts_are_judged_without_a_fit(folder: Path) -> None:
    options = ("--text", folder / "fit.txt", "--tokens", 1024, "--context", 64)
    run("calibrate", folder / "model", "--out", folder / "mine", *options, "--bits", 3)
    page = folder / "only.html"
    judged = ("--artifact", folder / "mine", "--recent", 8, "--json", folder / "only.json", "--plot", page)
    run("compare", folder / "model", "--text", folder / "judge.txt", *SMALL, *judged)
    rows = {row["method"]: row for row in json.loads((folder / "only.json").read_text())}
    assert rows["KVSplice mine"]["bits_per_element"] == 3 + 16 * 8 / 64
    assert rows["KVSplice mine"]["recent_window"] == 8
    assert rows["KVSplice mine"]["family"] == "KVSplice, artifacts"
    assert not [name for name in rows if name.startswith("rank")]
    assert "KVSplice mine" in page.read_text()
    assert not (folder / "only.png").exists()


def test_only_methods_that_were_asked_for_are_judged(folder: Path) -> None:
    texts = ("--text", folder / "judge.txt", "--fit-text", folder / "fit.txt", "--tokens", 1024)
    run("compare", folder / "model", *texts, *SMALL, "--only", "KVSplice 2", "--json", folder / "few.json")
    names = {row["method"] for row in json.loads((folder / "few.json").read_text())}
    assert names == {"KVSplice 2 bits", "KVSplice 2.5 bits"}
    with pytest.raises(KVSpliceError, match=r"no method has 'KIVA' in its name; there are: bfloat16, .*KIVI-4"):
        run("compare", folder / "model", *texts, *SMALL, "--only", "KIVA")


def test_an_artifact_of_another_model_is_refused(folder: Path) -> None:
    other = tiny_model("llama", folder / "other", num_hidden_layers=2)
    options = ("--text", folder / "fit.txt", "--tokens", 1024, "--context", 64)
    run("calibrate", other, "--out", folder / "others", *options)
    with pytest.raises(KVSpliceError, match="calibrated on another model"):
        run("compare", folder / "model", "--text", folder / "judge.txt", *SMALL, "--artifact", folder / "others")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "{}/judge.txt", "--fit-text", "{}/judge.txt"), "give --fit-text another one"),
        (("--text", "{}/judge.txt", "--plot", "{}/plot.pdf"), "plot.pdf is neither .png nor .html nor a directory"),
        (("--text", "{}/judge.txt", "--context", 4096), "exceed the 512 the model reads; lower --context"),
        (("--text", "{}/nothing.txt"), "there is no text"),
        (("--text", "{}/judge.txt", "--artifact", "{}/model"), "kvsplice.json"),
    ],
)
def test_mistakes_are_refused_with_a_way_out(folder: Path, options: tuple[object, ...], message: str) -> None:
    given = [option.format(folder) if isinstance(option, str) else option for option in options]
    with pytest.raises(KVSpliceError, match=message):
        run("compare", folder / "model", *given)

"""Runs in the field's formats: there and back again, from other tools, and into words."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.fim.reading import reading
from calibration.fim.runs import Run, from_table, make_run, read_runs, table, write_runs
from vllm_kvsplice.errors import KVSpliceError

# A record and a table as the field's tools write them.
RECORDS = [
    {
        "run_info": {
            "entity": "team",
            "project": "gpt2",
            "run_name": "a1",
            "display_name": "baseline",
            "state": "finished",
        },
        "config": {"fim_every": 500},
        "summary_metrics": {
            "fisher/trace_global_mean": 0.9165,
            "fisher/cond_global_mean": 7.49e6,
            "fisher/layer0/head0/cond": 4028828.5,
            "fisher/layer0/head0/eigmax": 0.0403,
            "fisher/layer6/head8/cond": 2.7e7,
            "fisher/layer6/head8/trace": 0.85,
            "fisher/layer6/head8/energy_r8": 0.95,
            "fisher/layer3/eigmax": 0.2,
            "fisher/layer0/head0/note": "stable",
            "fisher/broken": float("nan"),
            "train/loss": 3.2,
        },
        "history": {},
    }
]
TABLE = """run_name,layer,head,metric,value
baseline,global,all,trace_global_mean,0.9165
baseline,layer0,head0,cond,4028828.5
baseline,layer0,head0,eigmax,0.0403
RA,global,all,trace_global_mean,0.948
RA,layer11,head5,trace,0.975
"""


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_a_record_of_another_tool_is_read(tmp_path):
    run = read_runs(write(tmp_path / "fim_metrics_gpt2.json", json.dumps(RECORDS)))[0]
    assert run.name == "baseline"
    assert run.heads() == {
        (0, 0): {"cond": 4028828.5, "eigmax": 0.0403},
        (6, 8): {"cond": 2.7e7, "trace": 0.85, "energy_r8": 0.95},
    }
    assert run.overall("trace") == 0.9165
    assert run.overall("eigmax") == 0.0403
    assert "train/loss" not in run.metrics


def test_a_table_of_another_tool_is_read(tmp_path):
    baseline, changed = read_runs(write(tmp_path / "fim_summary_gpt2.csv", TABLE))
    assert (baseline.name, changed.name) == ("baseline", "RA")
    assert baseline.heads()[0, 0] == {"cond": 4028828.5, "eigmax": 0.0403}
    assert changed.metrics == {"fisher/trace_global_mean": 0.948, "fisher/layer11/head5/trace": 0.975}


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
PLACES = st.sampled_from(["", "layer0/", "layer12/", "layer3/head1/", "layer3/head11/", "layer29/kvhead2/"])
METRICS = st.dictionaries(
    st.builds("fisher/{}{}".format, PLACES, st.sampled_from(["trace", "eigmax", "cond", "energy_r8", "key_df"])),
    st.floats(allow_nan=False, allow_infinity=False),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(runs=st.dictionaries(NAMES, METRICS, min_size=1, max_size=3))
def test_runs_come_back_from_json_and_from_csv(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = [Run(run_info={"display_name": name}, summary_metrics=metrics) for name, metrics in runs.items()]
    records, rows = write_runs(made, folder, "all")
    assert (records.name, rows.name) == ("fim_metrics_all.json", "fim_summary_all.csv")
    for file in (records, rows):
        assert {run.name: run.metrics for run in read_runs(file)} == runs, file


def test_the_table_has_the_columns_and_the_global_rows_of_the_field(tmp_path):
    heads = {"fisher/layer0/head0/trace": 0.5, "fisher/layer0/head1/trace": 0.7, "fisher/layer0/kvhead0/key_trace": 9.0}
    _, rows = write_runs([make_run("mine", heads, {})], tmp_path, "mine")
    with rows.open() as opened:
        read = list(csv.reader(opened))
    assert read[0] == ["run_name", "layer", "head", "metric", "value"]
    assert ["mine", "global", "all", "trace_global_mean", "0.6"] in read
    assert ["mine", "global", "all", "trace_global_max", "0.7"] in read
    assert ["mine", "layer0", "head1", "trace", "0.7"] in read
    assert ["mine", "layer0", "kvhead0", "key_trace", "9.0"] in read


def test_spectra_and_origin_are_kept(tmp_path):
    spectra = {"fisher/layer0/head0/spectrum": [0.5, 0.25, 1e-9]}
    run = make_run("mine", {"fisher/layer0/head0/trace": 0.75}, spectra, text="pydoc", num_heads=9)
    back = read_runs(write_runs([run], tmp_path, "mine")[0])[0]
    assert back == run
    assert back.run_info.model_dump() == {"display_name": "mine", "text": "pydoc", "num_heads": 9}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot read FIM metrics"),
        ("a.json", '[{"summary_metrics": 3}]', "cannot read FIM metrics"),
        ("a.json", '[{"summary_metrics": {"train/loss": 3}}]', "holds no metric whose name begins with 'fisher/'"),
        ("a.csv", "layer,head,value\n1,2,3\n", "cannot read FIM metrics"),
        ("a.csv", "run_name,layer,head,metric,value\na,layer0,head0,trace,n/a\n", "holds no metric"),
        ("a.csv", "", "cannot read FIM metrics"),
    ],
)
def test_files_without_metrics_are_refused(tmp_path, name, content, message):
    with pytest.raises(KVSpliceError, match=message):
        read_runs(write(tmp_path / name, content))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(KVSpliceError, match="cannot read FIM metrics"):
        read_runs(tmp_path / "nowhere.json")


class TestReading:
    @pytest.fixture(scope="class")
    def runs(self) -> list[Run]:
        return [Run.model_validate(RECORDS[0]), *from_table(table([make_run("RA", HEADS, {})]))]

    def test_it_has_every_part(self, runs):
        words = reading(runs)
        titles = [
            line for line, under in zip(words.splitlines(), words.splitlines()[1:], strict=False) if "==" in under
        ]
        parts = ["Run baseline", "Run RA", "Runs compared", "Hotspots", "Heads of baseline", "Heads of RA"]
        assert titles == [*parts, "How to read this"]

    def test_hotspots_are_the_largest_of_all_runs_in_order(self, runs):
        lines = [line for line in reading(runs).splitlines() if line.startswith("cond")]
        assert [line.split()[1] for line in lines[:3]] == ["2.7e+07", "4.029e+06", "100"]
        assert "baseline: layer 6, head 8" in lines[0]

    def test_runs_are_compared_by_their_means(self, runs):
        assert "mean trace           from 0.75 (RA) to 0.9165 (baseline), 1.22x" in reading(runs)

    def test_heads_have_their_category(self, runs):
        assert "1 high_potential, 0 critical, 1 moderate" in reading(runs)
        assert "0 high_potential, 1 critical, 1 moderate" in reading(runs)

    def test_one_run_is_compared_with_nothing(self, runs):
        assert "Runs compared" not in reading(runs[:1])

    def test_what_a_record_lacks_is_said(self, runs):
        assert "mean energy_r16        not in the record" in reading(runs[:1])


HEADS = {
    "fisher/layer0/head0/trace": 0.98,
    "fisher/layer0/head1/trace": 0.52,
    "fisher/layer0/head0/cond": 100.0,
    "fisher/layer0/head0/energy_r8": 0.5,
}

"""The harness: our rows are those of `kvsplice eval`, position 0 is nobody's, and nothing is computed twice."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibration.attention import Reading, tapped
from calibration.compare.harness import Row, better_peer, compare
from calibration.compare.methods import KVSplice, Method
from calibration.compare.peers import PEERS
from calibration.evaluate import compressing_tap, evaluate, summed_loss
from calibration.models import load_model
from calibration.pipeline import calibrate
from calibration.recipe import CalibrationConfig
from calibration.text import token_windows
from tests.models import TEXT, tiny_model


class Nothing(Method):
    """Restores zeros, and remembers what it was asked for."""

    asked: list[tuple[int, ...]]

    def bits_per_element(self, context: int, head_dim: int) -> float:
        return 0

    def restore(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append((layer, *positions.tolist()))
        return torch.zeros_like(key), torch.zeros_like(value)


class Dense(Nothing):
    def dense_layers(self, num_layers: int) -> set[int]:
        return {0, num_layers - 1}


class Studied:
    """A tiny model, windows of text, and our codecs of it."""

    def __init__(self, folder: Path) -> None:
        (folder / "fit.txt").write_text(TEXT[20_000:])
        recipe = CalibrationConfig(bits=3, text=str(folder / "fit.txt"), tokens=1024, context=64)
        artifact = calibrate(str(tiny_model("llama", folder / "model")), folder / "artifact", recipe)
        self.model, tokenizer = load_model(str(folder / "model"), torch.float32)
        self.windows = token_windows(tokenizer, TEXT[:20_000], 2, 48)
        self.codecs = {index: artifact.layer(index) for index in artifact.compressed_layers}

    def rows(self, *methods: Method, recent: int = 0) -> list[Row]:
        return list(compare(self.model, methods, self.windows, recent, lambda: None))


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Studied:
    return Studied(tmp_path_factory.mktemp("compare"))


def nothing(kind: type[Nothing] = Nothing) -> Nothing:
    method = kind("", "")
    object.__setattr__(method, "asked", [])
    return method


@pytest.mark.parametrize("recent", [0, 8])
def test_our_rows_are_those_of_eval(studied: Studied, recent: int) -> None:
    (row,) = studied.rows(KVSplice("", "", studied.codecs), recent=recent)
    tap = compressing_tap(studied.codecs, "all")
    expected = evaluate(studied.model, tap, studied.windows, reading=Reading(recent))
    assert (row.ppl, row.baseline_ppl) == pytest.approx((expected.ppl, expected.baseline_ppl), rel=1e-6)
    assert (row.tokens, row.context, row.recent_window) == (2 * 47, 48, recent)
    assert row.bits_per_element == 3 + 16 * recent / 48


def test_errors_are_those_of_the_windows_own_changes(studied: Studied) -> None:
    one, other = (
        list(compare(studied.model, PEERS[:4], studied.windows[i : i + 1], 0, lambda: None))[3] for i in range(2)
    )
    both = studied.rows(PEERS[3])[0]
    nats = [math.log(row.ppl / row.baseline_ppl) for row in (one, other)]
    # Two values differ from their mean by half their difference: its standard error is that half.
    assert both.standard_error_percent == pytest.approx(
        100 * both.ppl / both.baseline_ppl * abs(nats[0] - nats[1]) / 2, rel=1e-3
    )
    assert math.isnan(one.standard_error_percent)


def test_position_0_is_read_exactly_and_shown_to_no_method(studied: Studied) -> None:
    method = nothing()
    (row,) = studied.rows(method)
    assert method.asked == 2 * [(layer, *range(1, 48)) for layer in range(3)]

    def tap(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.zeros(48, 1).index_fill(0, torch.tensor(0), 1)
        return key * keep, value * keep

    with tapped(studied.model, tap):
        nats = sum(summed_loss(studied.model, window) for window in studied.windows)
    assert row.ppl == pytest.approx(float(torch.tensor(nats / (2 * 47)).exp()), rel=1e-5)


def test_dense_layers_are_left_alone(studied: Studied) -> None:
    method = nothing(Dense)
    (row,) = studied.rows(method)
    assert {layer for layer, *_ in method.asked} == {1}
    assert row.bits_per_element == pytest.approx(2 / 3 * 16)


def test_a_window_over_everything_leaves_only_what_reads_by_its_own_rule(studied: Studied) -> None:
    methods = [method for method in PEERS if method.name in ("int2", "KIVI-2")]
    assert {method.name: bool(method.own_window) for method in methods} == {"int2": False, "KIVI-2": True}
    (lossy, _), (exact, kivi) = studied.rows(*methods), studied.rows(*methods, recent=48)
    assert abs(lossy.change_percent) > 1e-3
    assert exact.change_percent == pytest.approx(0, abs=1e-4)
    # Its own residual of 128 tokens covers these windows.
    assert (kivi.change_percent, kivi.bits_per_element) == (pytest.approx(0, abs=1e-4), 16)


def test_the_uncompressed_model_runs_once_for_all_methods(studied: Studied) -> None:
    runs: list[int] = []
    calls: list[int] = []
    hook = studied.model.register_forward_pre_hook(lambda *_: runs.append(1))
    rows = list(compare(studied.model, PEERS[:3], studied.windows, 0, lambda: calls.append(1)))
    hook.remove()
    # Two windows plain and under each of three methods; one token tells which layers there are.
    assert (len(rows), len(calls), len(runs)) == (3, 8, 9)


def row(family: str, bits: float, ppl: float) -> Row:
    return Row(f"{family} {bits:g}", family, family.startswith("ours"), bits, ppl, 0.0, 0.0, 10.0, 100, 50, 0)


def test_the_smallest_peer_that_is_as_good_is_found() -> None:
    ours, peers = (
        row("ours", 3, 12),
        [row("a", 2, 13), row("b", 5, 12), row("a", 4.5, 11.9), row("ours, trained", 2, 11)],
    )
    assert better_peer(ours, peers) == peers[2]
    assert better_peer(row("ours", 3, 11), peers) is None


@pytest.mark.model
def test_on_the_real_model_more_bits_are_better_and_ours_beats_peers_of_its_size(smollm, smollm_artifact) -> None:
    from vllm_kvsplice.artifact import load_artifact

    model, tokenizer = load_model(str(smollm), torch.float32)
    artifact = load_artifact(smollm_artifact)
    ours = KVSplice("ours", "ours", {index: artifact.layer(index) for index in artifact.compressed_layers})
    windows = token_windows(tokenizer, TEXT, 2, 192)
    names = ("bfloat16", "int8", "int4", "int4 + Hadamard", "int3", "turboquant_4bit_nc, all layers")
    peers = [method for method in PEERS if method.name in names]
    change = {row.method: row.change_percent for row in compare(model, [*peers, ours], windows, 0, lambda: None)}
    print(change)
    assert abs(change["bfloat16"]) < 0.5
    assert abs(change["int8"]) < 2
    assert change["int8"] < change["int4"] < change["int3"]
    assert change["int4 + Hadamard"] < change["int4"]
    # All of these take more bits than our 4.
    assert change["ours"] < min(change[name] for name in names if name not in ("bfloat16", "int8"))

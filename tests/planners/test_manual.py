"""Plans written by hand, and plans as files: what is written is what is stored, and slips are errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.plan import Plan
from calibration.planners.budget import plan_by_fisher
from calibration.planners.files import describe, is_plan_file, load_plan_file, read_plan
from calibration.planners.manual import ManualConfig, plan_manual, read_manual
from tests.calibration.test_plan import convex
from vllm_kvsplice.errors import KVSpliceError

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPE = (2, 12, 12, 8)
DISTORTION = convex(SHAPE, 0)
EXAMPLE = {
    "global": {"algo_default": "kvsplice", "rank": 32, "bits": 6, "d_k": 64, "d_v": 64},
    "per_layer_head": {
        "6/8": {"enabled": True, "algo": "kvsplice", "rank": 8, "reason": "cond 2.7e7"},
        "11/5": {"enabled": False},
        "0/1": {"compression_ratio": 0.75, "bits": 4},
        "0/2": {"key": {"rank": 40, "bits": 5}, "value": {"rank": 16, "bits": 3}},
        "0/3": {"rank": 20, "value": {"bits": 2}},
    },
}


def plan(content: dict[str, Any]) -> Plan:
    return plan_manual(DISTORTION, range(12), ManualConfig.model_validate(content))


def head(made: Plan, layer: int, index: int) -> list[list[int]]:
    return made.widths[:, layer, index].tolist()


def test_what_is_written_is_what_is_stored():
    made = plan(EXAMPLE)
    assert head(made, 6, 8) == [[6] + [0] * 7] * 2
    assert head(made, 11, 5) == [[8] * 8] * 2
    assert head(made, 0, 1) == [[4, 4] + [0] * 6] * 2
    assert head(made, 0, 2) == [[5] * 5 + [0] * 3, [3, 3] + [0] * 6]
    # A rank is rounded up to whole groups of 8; what is left open is the head's or everyone's.
    assert head(made, 0, 3) == [[6] * 3 + [0] * 5, [2] * 3 + [0] * 5]
    assert head(made, 3, 3) == [[6] * 4 + [0] * 4] * 2
    assert made.reasons[6][8] == "cond 2.7e7"
    assert made.planner == "manual"


ALGORITHMS = {
    "algo_default": "kvsplice",
    "per_layer_head": {"6/8": {"algo": "pca"}, "6/9": {"rank": 8}, "7/0": {"algo": "none"}},
}


def test_heads_are_fitted_as_they_say():
    made = plan(ALGORITHMS)
    assert made.fits[6] == ("kvsplice",) * 8 + ("pca",) + ("kvsplice",) * 3
    # Left in 8 bits, and fitted as others are.
    assert made.fits[7][0] == "kvsplice"
    assert plan({"per_layer_head": {"6/8": {"algo": "pca"}}}).fits[6] == (None,) * 8 + ("pca",) + (None,) * 3


def test_heads_nobody_mentions_have_four_bits():
    assert (plan({"per_layer_head": {}}).widths == 4).all()


def test_settings_may_stand_beside_global_and_heads_may_be_spelt_out():
    beside = {"rank": 16, "algo_default": "pca", "per_layer_head": {"layer6/head8": {"enabled": False}}}
    made = plan(beside | {"comment": "by hand", "expected_kv_memory_savings": "68%"})
    assert torch.equal(made.widths, plan({"global": {"rank": 16}, "per_layer_head": {"6/8": {"algo": "none"}}}).widths)


@pytest.mark.parametrize("reduction", [0.5, 0.65, 0.8, 0.875])
def test_the_rest_shares_what_a_target_leaves(reduction):
    by_hand = {"6/8": {"rank": 8}, "11/5": {"enabled": False}}
    made = plan({"target_memory_reduction": reduction, "per_layer_head": by_hand})
    dense = 2 * 12 * 12 * 64 * 2
    assert made.bytes_per_token <= (1 - reduction) * dense
    # One byte more for the keys and values of every free head would not fit.
    assert made.bytes_per_token + 2 * (144 - 2) + 12 * 16 > (1 - reduction) * dense
    assert head(made, 6, 8) == [[8] + [0] * 7] * 2
    assert head(made, 0, 0) == head(made, 9, 3)


def test_a_target_that_hands_have_spent_already_is_refused():
    everything = {f"{layer}/{h}": {"enabled": False} for layer in range(12) for h in range(12)}
    with pytest.raises(KVSpliceError, match=r"target_memory_reduction 0\.6 leaves 14745 bytes"):
        plan({"target_memory_reduction": 0.6, "per_layer_head": everything})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"per_layer_head": {"6-8": {}}}, r"'6-8' is not of the form"),
        ({"per_layer_head": {"12/0": {}}}, "layer 12 has no cache to compress"),
        ({"per_layer_head": {"0/12": {}}}, "caches 12 KV heads a layer, numbered 0 to 11"),
        ({"per_layer_head": {"1/1": {}, "layer1/head1": {}}}, "'layer1/head1' sets a head that another name has set"),
        ({"global": {"d_k": 128}}, "global: d_k is 128, but the heads of this model have 64"),
        ({"per_layer_head": {"1/1": {"d_v": 32}}}, "1/1: d_v is 32"),
        ({"per_layer_head": {"1/1": {"rank": 72}}}, "rank 72 exceeds the 64"),
        ({"per_layer_head": {"1/1": {"key": {"rank": 65}}}}, "rank 65 exceeds the 64"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(content, message):
    with pytest.raises(KVSpliceError, match=message):
        plan(content)


def write(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "plan.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"global": {"ranks": 8}}, r"global\.ranks: Extra inputs"),
        ({"per_layer_heads": {}}, r"global\.per_layer_heads: Extra inputs"),
        ({"per_layer_head": {"6/8": {"enable": True}}}, r"per_layer_head\.6/8\.enable: Extra inputs"),
        ({"per_layer_head": {"6/8": {"key": {"rnk": 8}}}}, r"per_layer_head\.6/8\.key\.rnk"),
        ({"per_layer_head": {"6/8": {"algo": "kvspilce"}}}, r"6/8\.algo: Input should be 'pca'"),
        ({"per_layer_head": {"6/8": {"bits": 9}}}, r"6/8\.bits: Input should be less than or equal to 8"),
        ({"global": {"target_memory_reduction": 1.5}}, "target_memory_reduction: Input should be less than 1"),
        ('{"per_layer_head": {"6/8": {}, "6/8": {"rank": 8}}}', "'6/8' is set twice"),
        ({"global": {"rank": 8}, "rank": 16}, "rank stands in global and beside it"),
        ("[]", "holds no JSON object"),
        ("{", "cannot read the plan"),
    ],
)
def test_slips_of_the_pen_are_errors(tmp_path, content, message):
    with pytest.raises(KVSpliceError, match=message):
        read_manual(write(tmp_path, content))


NAMES = sorted({*ManualConfig.model_fields["everywhere"].annotation.model_fields, "reason", "enabled", "d_k", "key"})


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 20), st.sampled_from("abkr_"))
def test_a_mistyped_setting_never_passes(name, place, letter):
    typed = name[: place % len(name)] + letter + name[place % len(name) + 1 :]
    known = ManualConfig.model_fields["per_layer_head"].annotation.__args__[1].model_fields
    if typed not in known:
        with pytest.raises(ValueError, match="Extra inputs"):
            ManualConfig.model_validate({"per_layer_head": {"0/0": {typed: None}}})


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.name)
def test_every_shipped_example_is_a_plan_for_the_model_it_names(file):
    layers, heads = (30, 3) if "smollm2" in file.name else (12, 12)
    distortion = convex((2, layers, heads, 8), 0)
    made = plan_manual(distortion, range(layers), read_manual(file))
    assert any("as every head" not in reason for row in made.reasons for reason in row)


class TestFiles:
    def test_a_plan_comes_back_from_its_file(self, tmp_path):
        made = plan_by_fisher(DISTORTION, 6000)
        file = write(tmp_path, describe(made, range(12), "gpt2", 2, [(3000, 0.1)]).model_dump_json())
        assert is_plan_file(file)
        back = read_plan(file, DISTORTION, range(12))
        assert torch.equal(back.widths, made.widths)
        assert (back.planner, back.reasons) == (made.planner, made.reasons)
        assert back.distortion == pytest.approx(made.distortion)

    def test_so_do_the_algorithms_of_its_heads(self, tmp_path):
        made = plan(ALGORITHMS)
        file = write(tmp_path, describe(made, range(12), "gpt2", 0).model_dump_json())
        assert read_plan(file, DISTORTION, range(12)).fits == made.fits

    def test_dense_layers_count_in_its_sizes(self, tmp_path):
        made = plan_by_fisher(DISTORTION, 6000)
        content = describe(made, range(12), "gpt2", 2)
        layer = 2 * 12 * 64 * 2
        assert content.baseline_bytes_per_token == 14 * layer
        assert content.bytes_per_token == made.bytes_per_token + 2 * layer
        assert content.memory_saving_percent == pytest.approx(100 * (1 - content.bytes_per_token / (14 * layer)))

    def test_a_plan_of_another_model_is_refused(self, tmp_path):
        file = write(tmp_path, describe(plan_by_fisher(DISTORTION, 6000), range(12), "", 0).model_dump_json())
        for distortion, layers in ((DISTORTION, range(1, 13)), (convex((2, 12, 4, 8), 0), range(12))):
            with pytest.raises(KVSpliceError, match="is a plan for another model"):
                read_plan(file, distortion, layers)

    @pytest.mark.parametrize("width", [9, -1, 2.5, "wide"])
    def test_a_width_that_does_not_exist_is_refused(self, tmp_path, width):
        content = json.loads(describe(plan_by_fisher(DISTORTION, 6000), range(12), "", 0).model_dump_json())
        content["layers"][3]["heads"][2]["key"][1] = width
        with pytest.raises(KVSpliceError, match=r"is no plan \(layers\.3\.heads\.2\.key\.1\)"):
            load_plan_file(write(tmp_path, content))

    def test_a_configuration_written_by_hand_is_no_plan_file(self, tmp_path):
        assert not is_plan_file(write(tmp_path, EXAMPLE))

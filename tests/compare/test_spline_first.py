"""Values that are warped before they are coded."""

import pytest
import torch
from torch import Tensor

from calibration.attention import Reading, tapped
from calibration.compare.spline_first import fit_warp, spline_first
from calibration.recipe import CalibrationConfig
from calibration.study import Study, study
from tests.huggingface.agreement import agree
from tests.models import TEXT, tiny_model
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.huggingface import KVSpliceCache


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("spline")
    (folder / "text.txt").write_text(TEXT)
    config = CalibrationConfig(text=str(folder / "text.txt"), tokens=1024, context=64)
    return study(str(tiny_model("llama", folder / "model")), config)


SKEWED = torch.randn(2, 3000, 8, generator=torch.Generator().manual_seed(0)).mul(0.6).exp() * 3 - 1


def test_warping_back_is_exact_also_beyond_what_was_seen() -> None:
    warp = fit_warp(SKEWED)
    values = torch.cat((SKEWED, SKEWED[:, :5] + 10), 1)
    torch.testing.assert_close(warp.inverse(warp(values)), values, rtol=0, atol=1e-4)


def test_a_warp_works_where_its_values_are() -> None:
    warp = fit_warp(SKEWED)
    elsewhere = torch.empty(2, 5, 8, device="meta")
    assert warp.inverse(warp(elsewhere)).device == elsewhere.device


def test_warped_values_are_nearly_gaussian() -> None:
    warped = fit_warp(SKEWED)(SKEWED)
    z = (warped - warped.mean(1, keepdim=True)) / warped.std(1, keepdim=True)
    assert (z.pow(3).mean(1).abs() < 0.2).all()
    assert (z.pow(4).mean(1) - 3).abs().max() < 0.6
    # The order of values stays.
    assert (warped.gather(1, SKEWED.argsort(1)).diff(dim=1) >= 0).all()


def test_eight_bits_read_back_what_was_stored(measured: Study) -> None:
    method = spline_first(measured, 8)
    layer, kind = measured.layers[1], measured.statistics.value
    value = (kind.mean[1][:, None] + kind.residual[1].float())[:, :200]
    key = torch.zeros_like(value)
    _, read = method.restore(layer, key, value, torch.arange(1, 201))
    error = (read - value).square().mean() / value.var()
    assert error < 0.01
    assert method.bits_per_element(64, 32) == pytest.approx(8)


@torch.no_grad()
def test_a_cache_reads_what_evaluation_reads(measured: Study) -> None:
    method, model = spline_first(measured, 4), measured.model.float()
    tokens = measured.windows[:2]

    def tap(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [method.restore(layer, k, v, torch.arange(k.shape[1])) for k, v in zip(key, value, strict=True)]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])

    with tapped(model, tap, Reading(20)):
        expected = model(tokens, use_cache=False).logits
    cache = KVSpliceCache(method.artifact, model.config, 20, value_warps=method.warps)
    pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split([30, 1, tokens.shape[1] - 31], 1)]
    assert agree(torch.cat(pieces, 1), expected)
    unwarped = KVSpliceCache(method.artifact, model.config, 20)
    assert not agree(model(tokens, past_key_values=unwarped).logits, expected)


def test_pruning_and_warping_are_not_had_together(measured: Study) -> None:
    method = spline_first(measured, 4)
    with pytest.raises(KVSpliceError, match="leave one of them out"):
        KVSpliceCache(method.artifact, measured.model.config, prune_values=8, value_warps=method.warps)

"""What `collect` measures, against a direct computation over all tokens at once and against finite differences."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration import statistics as module
from calibration.attention import Reading, tapped
from calibration.models import load_model, rotary_of
from calibration.statistics import (
    FIRST_ORDINARY,
    NEAR_SHARE,
    Statistics,
    collect,
    fingerprint,
    fisher_noise,
    load_statistics,
    save_statistics,
    with_floor,
)
from tests.models import TEXT, tiny_model
from vllm_kvsplice.errors import KVSpliceError

KINDS = ("key", "value")


class Measured(NamedTuple):
    model: PreTrainedModel
    windows: Tensor
    statistics: Statistics


def measure(model: PreTrainedModel, windows: Tensor, seed: int = 0) -> Statistics:
    return collect(model, windows, rotary_of(model), seed=seed, progress=lambda: None)


def load(family: str, directory: Path, windows: int = 6, length: int = 33) -> tuple[PreTrainedModel, Tensor]:
    """A tiny model in float64 and token ids [windows, length]."""
    model, tokenizer = load_model(str(tiny_model(family, directory)), torch.float64)
    tokens = tokenizer(TEXT[: windows * length * 8]).input_ids[: windows * length]
    return model, torch.tensor(tokens).view(windows, length)


@pytest.fixture(scope="module", params=["llama", "gpt2", "glm4", "gemma3"])
def measured(request, tmp_path_factory) -> Measured:
    model, windows = load(request.param, tmp_path_factory.mktemp("model"))
    return Measured(model, windows, measure(model, windows))


@pytest.fixture
def llama(tmp_path) -> tuple[PreTrainedModel, Tensor]:
    return load("llama", tmp_path)


def attended(model: PreTrainedModel, windows: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of full-attention layers, [W, H, T, D], all windows in one batch."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found[layer] = (key, value)
        return key, value

    with torch.no_grad(), tapped(model, keep):
        model(windows, use_cache=False)
    return found


def said(model: PreTrainedModel, windows: Tensor, offsets: dict[int, tuple[Tensor, Tensor]], recent: int = 0) -> Tensor:
    """Logits of all windows with `offsets` added to keys and values that are read as stored."""

    def shift(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key_offset, value_offset = offsets.get(layer, (0, 0))
        return key + key_offset, value + value_offset

    with tapped(model, shift, Reading(recent)):
        return model(windows, use_cache=False).logits


def noise_of(logits: Tensor, seed: int = 0) -> Tensor:
    """What `collect` draws, window after window."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([fisher_noise(window.detach().float(), generator) for window in logits])


def gradients(model: PreTrainedModel, windows: Tensor, recent: int = 0) -> list[list[Tensor]]:
    """Those drawn, with respect to ordinary tokens' keys and values, [H, tokens, D] each, by layer."""
    offsets = {
        layer: tuple(torch.zeros_like(x).requires_grad_() for x in pair)
        for layer, pair in attended(model, windows).items()
    }
    logits = said(model, windows, offsets, recent)
    (logits * noise_of(logits)).sum().backward()
    return [[ordinary(offset.grad) for offset in pair] for _, pair in sorted(offsets.items())]


def unrotated(model: PreTrainedModel, key: Tensor) -> Tensor:
    """Keys [W, H, T, D] before rotation, in float64."""
    rotary = rotary_of(model)
    return rotary.unrotate(key, torch.arange(key.shape[2])) if rotary else key


def ordinary(x: Tensor) -> Tensor:
    """[W, H, T, D] without the first tokens of each window, as [H, tokens, D]."""
    return x[:, :, FIRST_ORDINARY:].transpose(0, 1).flatten(1, 2)


def test_means_are_those_of_all_ordinary_tokens(measured):
    model, windows, statistics = measured
    for row, (_, (key, value)) in enumerate(sorted(attended(model, windows).items())):
        for kind, plain in (("key", unrotated(model, key)), ("value", value)):
            mean = getattr(statistics, kind).mean[row].double()
            torch.testing.assert_close(mean, ordinary(plain).mean(1), atol=2e-6, rtol=1e-5)


def test_mean_of_keys_is_that_of_the_projection(llama):
    model, windows = llama
    found: list[Tensor] = []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _, __, out: found.append(out))
    attended(model, windows)
    expected = found[0][:, FIRST_ORDINARY:].flatten(0, 1).mean(0).view(2, 32)
    torch.testing.assert_close(measure(model, windows).key.mean[1].double(), expected, atol=2e-6, rtol=1e-5)


def test_noise_has_the_covariance_of_the_fisher_information():
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5]).expand(40000, -1)
    noise = fisher_noise(logits, torch.Generator().manual_seed(0))
    p = logits[0].softmax(-1)
    torch.testing.assert_close(noise.mT @ noise / len(noise), p.diag() - torch.outer(p, p), atol=3e-3, rtol=0)
    torch.testing.assert_close(noise.sum(-1), torch.zeros(len(noise)), atol=1e-5, rtol=0)


def test_fisher_is_the_mean_outer_product_of_gradients(measured):
    model, windows, statistics = measured
    for row, pair in enumerate(gradients(model, windows)):
        for kind, gradient in zip(KINDS, pair, strict=True):
            expected = gradient.mT @ gradient / gradient.shape[1]
            fisher = getattr(statistics, kind).fisher[row].double()
            assert (fisher - expected).norm() < 1e-4 * expected.norm()


def test_fisher_beside_a_window_is_of_what_is_read_as_stored_and_a_little_of_all(llama):
    model, windows = llama
    statistics = collect(model, windows, rotary_of(model), recent=9, progress=lambda: None)
    for row, (far, everywhere) in enumerate(zip(gradients(model, windows, 9), gradients(model, windows), strict=True)):
        for kind, g, every in zip(KINDS, far, everywhere, strict=True):
            expected = (g.mT @ g + NEAR_SHARE * every.mT @ every) / g.shape[1]
            fisher = getattr(statistics, kind).fisher[row].double()
            assert (fisher - expected).norm() < 1e-4 * expected.norm()
            assert (fisher - every.mT @ every / g.shape[1]).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_agrees_with_finite_differences(kind, tmp_path):
    # GPT-2, because no part of it computes in float32 whatever the model's dtype, as RMSNorm does.
    model, windows = load("gpt2", tmp_path)
    # Token 4 is the only ordinary one.
    window, token, layer, head, step = windows[:1, : FIRST_ORDINARY + 1], FIRST_ORDINARY, 1, 1, 1e-5
    shape = attended(model, window)[layer][0].shape
    gradient = torch.zeros(shape[-1], dtype=torch.float64)
    with torch.no_grad():
        noise = noise_of(said(model, window, {}))
    for dimension in range(shape[-1]):
        sums = []
        for sign in (1, -1):
            bump = torch.zeros(shape, dtype=torch.float64)
            bump[0, head, token, dimension] = sign * step
            nothing = torch.zeros_like(bump)
            offsets = {layer: (bump, nothing) if kind == "key" else (nothing, bump)}
            with torch.no_grad():
                sums.append((said(model, window, offsets) * noise).sum())
        gradient[dimension] = (sums[0] - sums[1]) / (2 * step)
    fisher = getattr(measure(model, window), kind).fisher[layer, head].double()
    expected = torch.outer(gradient, gradient)
    assert (fisher - expected).norm() < 1e-4 * expected.norm()


def test_residuals_are_tokens_less_their_mean(measured):
    model, windows, statistics = measured
    positions, rotary = torch.arange(windows.shape[1]), rotary_of(model)
    for row, (_, (key, value)) in enumerate(sorted(attended(model, windows).items())):
        mean = ordinary(unrotated(model, key)).mean(1)[:, None].expand(-1, len(positions), -1)
        expected = {
            "key": ordinary(key - (rotary.rotate(mean, positions) if rotary else mean)),
            "value": ordinary(value) - ordinary(value).mean(1, keepdim=True),
        }
        for kind in KINDS:
            residual = getattr(statistics, kind).residual[row].double()
            # Every ordinary token was sampled, in an order of its own: compare what does not depend on the order.
            assert residual.shape == expected[kind].shape
            found, wanted = (x.mT @ x for x in (residual, expected[kind]))
            assert (found - wanted).norm() < 1e-3 * wanted.norm()
            lengths = [x.norm(dim=-1).sort().values for x in (residual, expected[kind])]
            torch.testing.assert_close(*lengths, atol=1e-3, rtol=1e-3)


def test_tokens_weigh_what_the_loss_feels_of_them(measured):
    model, windows, statistics = measured
    for row, pair in enumerate(gradients(model, windows)):
        for kind, gradient in zip(KINDS, pair, strict=True):
            fisher = with_floor(getattr(statistics, kind).fisher[row])
            gradient = gradient.double()
            felt = torch.einsum("htd,hde,hte->ht", gradient, torch.linalg.inv(fisher), gradient)
            weight = getattr(statistics, kind).weight[row].double()
            # Every ordinary token was sampled, in an order of its own.
            found, expected = weight.sort().values, (felt / felt.mean(-1, keepdim=True)).sort().values
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)


def test_no_direction_of_a_floored_fisher_matrix_is_free():
    floored = with_floor(torch.diag_embed(torch.tensor([[4.0, 0.0], [0.0, 0.0]])))
    torch.testing.assert_close(floored[0].diagonal(), torch.tensor([4.1, 0.1], dtype=torch.float64))
    assert (torch.linalg.eigvalsh(floored) > 0).all()


def test_residuals_have_no_mean(measured):
    kinds = KINDS if rotary_of(measured.model) is None else ("value",)
    for residual in (getattr(measured.statistics, kind).residual.double() for kind in kinds):
        assert (residual.mean(2).abs() < 1e-3 * residual.std(2)).all()


def test_sinks_of_one_token_texts_are_position_0_of_long_texts(measured):
    model, windows, statistics = measured
    for row, (_, pair) in enumerate(sorted(attended(model, windows.flatten()[:, None].expand(-1, 8)).items())):
        for kind, long in zip(KINDS, pair, strict=True):
            sinks, firsts = getattr(statistics, kind).sink[row].double(), long[:, :, 0].transpose(0, 1)
            distance = torch.cdist(sinks, firsts).min(-1).values
            assert (distance < 1e-5 * firsts.norm(dim=-1).mean()).all()


def test_sliding_windows_are_not_measured(tmp_path):
    model, windows = load("gemma3", tmp_path)
    statistics = measure(model, windows)
    assert statistics.layers == (1, 2)
    assert statistics.tokens == windows.numel()
    assert len(statistics.key.mean) == len(statistics.value.residual) == 2


@pytest.mark.parametrize("count", [1, 5, 12, 40])
def test_samples_do_not_grow_with_the_text(count, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 24)
    model, windows = load("llama", tmp_path, windows=count, length=16)
    samples = measure(model, windows).key.residual.shape[2]
    assert min(24, count * (16 - FIRST_ORDINARY)) - count <= samples <= 24


def test_same_seed_gives_the_same_measurements_and_another_seed_others(llama, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 24)
    first, again, other = (measure(*llama, seed=seed) for seed in (0, 0, 1))
    for kind in KINDS:
        for name, tensor in vars(getattr(first, kind)).items():
            assert torch.equal(tensor, getattr(getattr(again, kind), name))
        assert torch.equal(getattr(first, kind).mean, getattr(other, kind).mean)
        assert not torch.equal(getattr(first, kind).residual, getattr(other, kind).residual)


def test_progress_is_reported_once_per_window(llama):
    model, windows = llama
    calls = []
    collect(model, windows, rotary_of(model), progress=lambda: calls.append(1))
    assert len(calls) == len(windows)


def test_model_that_computes_nonsense_is_refused(llama):
    model, windows = llama
    rotary = rotary_of(model)
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(KVSpliceError, match="not finite"):
        collect(model, windows, rotary, progress=lambda: None)


def test_saved_measurements_come_back_bit_for_bit(measured, tmp_path):
    file = tmp_path / "folder" / "statistics.safetensors"
    save_statistics(measured.statistics, file, "this")
    loaded = load_statistics(file, "this")
    assert (loaded.layers, loaded.tokens) == (measured.statistics.layers, measured.statistics.tokens)
    for kind in KINDS:
        for name, tensor in vars(getattr(measured.statistics, kind)).items():
            back = getattr(getattr(loaded, kind), name)
            assert back.dtype == tensor.dtype
            assert torch.equal(back, tensor)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_measurements_of_something_else_are_not_used(measured, tmp_path):
    file = tmp_path / "statistics.safetensors"
    assert load_statistics(file, "this") is None
    save_statistics(measured.statistics, file, "this")
    assert load_statistics(file, "that") is None


@pytest.mark.parametrize("content", [b"", b"no measurements", b"\x10\0\0\0\0\0\0\0{}"])
def test_file_without_measurements_is_refused(content, tmp_path):
    file = tmp_path / "statistics.safetensors"
    file.write_bytes(content)
    with pytest.raises(KVSpliceError, match="holds no measurements"):
        load_statistics(file, "this")


def test_fingerprint_names_model_text_and_seed(llama):
    model, windows = llama
    own = fingerprint(model, windows, 0, 0, 0)
    assert own == fingerprint(model, windows.clone(), 0, 0, 0)
    assert own not in (
        fingerprint(model, windows + 1, 0, 0, 0),
        fingerprint(model, windows, 0, 1, 0),
        fingerprint(model, windows, 0, 0, 32),
        fingerprint(model, windows, 1, 0, 0),
    )
    model.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    assert own != fingerprint(model, windows, 0, 0, 0)


def test_fingerprint_tells_long_windows_from_short_ones_of_the_same_tokens(llama):
    model, windows = llama
    shorter = windows.reshape(-1, windows.shape[1] // 3)
    assert fingerprint(model, windows, 0, 0, 0) != fingerprint(model, shorter, 0, 0, 0)

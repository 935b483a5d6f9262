"""What methods store of a whole cache, by hand; KIVI's window, token by token; principal components of a real pass."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calibration.attention import ATTENTION, tapped
from calibration.compare.harness import total_bits
from calibration.compare.integers import ChannelIntegers, TokenIntegers
from calibration.compare.methods import Kivi, KVSplice, Method
from calibration.compare.peers import PEERS, rank_peers
from calibration.models import load_model
from calibration.statistics import FIRST_ORDINARY
from tests.codecs import make_codec
from tests.models import tiny_model

BY_NAME = {method.name: method for method in PEERS}
# Bits of 1024 tokens in heads of 64, counted by hand: per token and head, bits of keys and of values over 128 elements.
BY_HAND = {
    "bfloat16": 16,
    "vLLM fp8_e4m3": 8,
    "vLLM fp8_per_token_head": 2 * (64 * 8 + 32) / 128,
    "vLLM int8_per_token_head": 2 * (64 * 8 + 32) / 128,
    "vLLM int4_per_token_head": 2 * (64 * 4 + 32) / 128,
    "int4": 2 * (64 * 4 + 32) / 128,
    "int2 + Hadamard": 2 * (64 * 2 + 32) / 128,
    "vLLM turboquant_k8v4": (64 * 8 + 64 * 4 + 32) / 128,
    "vLLM turboquant_4bit_nc": (64 * 4 + 16 + 64 * 4 + 32) / 128,
    "turboquant_k3v4_nc, all layers": (64 * 3 + 16 + 64 * 4 + 32) / 128,
    "turboquant_3bit_nc, all layers": (64 * 3 + 16 + 64 * 3 + 32) / 128,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_bits_are_those_counted_by_hand(name: str) -> None:
    assert BY_NAME[name].bits_per_element(1024, 64) == BY_HAND[name]


def test_names_are_not_given_twice() -> None:
    assert len(BY_NAME) == len(PEERS)


def test_bits_of_kivi_contain_its_residual() -> None:
    # Groups of 4 tokens and of 8 dimensions, residual 8, heads of 16, at lengths 17 to 24. A stored key of 16 dimensions
    # takes 16 * 2 bits and a quarter of 16 * 32, a stored value 16 * 2 bits and twice 32; an exact one of either 256.
    key, value = 32 + 128, 32 + 64
    keys = [(16, 1), (16, 2), (16, 3), (16, 4), (16, 5), (16, 6), (16, 7), (24, 0)]
    sizes = [stored * key + exact * 256 + (stored + exact - 8) * value + 8 * 256 for stored, exact in keys]
    expected = sum(size / (32 * length) for size, length in zip(sizes, range(17, 25), strict=True)) / 8
    method = Kivi("", "", ChannelIntegers(2, 4), TokenIntegers(2, 8), residual=8)
    assert method.bits_per_element(24, 16) == pytest.approx(expected, rel=1e-12)
    assert method.bits_per_element(7, 16) == 16


@pytest.mark.parametrize("preset", ["k8v4", "4bit_nc", "k3v4_nc", "3bit_nc"])
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_turboquant_has_slots_and_dense_layers_of_vllm(preset: str, dim: int) -> None:
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    method = BY_NAME[f"vLLM turboquant_{preset}"]
    slot = TurboQuantConfig.from_cache_dtype(f"turboquant_{preset}", dim).slot_size_aligned
    assert method.bits_per_element(1000, dim) == 8 * slot / (2 * dim)
    for layers in (1, 3, 5, 30):
        config = SimpleNamespace(is_hybrid=False, hf_text_config=SimpleNamespace(num_hidden_layers=layers))
        assert {str(i) for i in method.dense_layers(layers)} == set(TurboQuantConfig.get_boundary_skip_layers(config))


def test_dense_layers_and_the_window_count() -> None:
    shape = SimpleNamespace(num_layers=10, head_dim=64)
    turbo, kivi = BY_NAME["vLLM turboquant_4bit_nc"], BY_NAME["KIVI-2"]
    assert total_bits(turbo, range(10), shape, 1024, 0) == pytest.approx((4 * 16 + 6 * 4.375) / 10)
    assert total_bits(turbo, range(10), shape, 1024, 64) == pytest.approx((4 * 16 + 6 * (4.375 + 1)) / 10)
    # Layers with a sliding window are not compared: of the first two, here only one is.
    assert total_bits(turbo, range(1, 8), shape, 1024, 0) == pytest.approx((16 + 6 * 4.375) / 7)
    assert total_bits(BY_NAME["int4"], range(10), shape, 40, 64) == 5 - 0.5 + 16
    assert total_bits(kivi, range(10), shape, 1024, 64) == kivi.bits_per_element(1024, 64)


def test_ours_is_as_large_as_its_pages() -> None:
    codecs = {1: make_codec(2, 24, widths=(3,)), 2: make_codec(2, 24, widths=(5,))}
    method = KVSplice("", "", codecs)
    # Three groups of 8 in two heads, keys and values: 36 bytes in 48 and 60 in 64, of 96 elements.
    assert method.bits_per_element(100, 24) == pytest.approx((48 + 64) / 2 * 8 / 96)
    assert method.dense_layers(4) == {0, 3}
    shape = SimpleNamespace(num_layers=4, head_dim=24)
    assert total_bits(method, range(4), shape, 100, 0) == pytest.approx((2 * 16 + 4 + 16 / 3) / 4)


def stream(query: Tensor, key: Tensor, value: Tensor, length: int, method: Kivi) -> Tensor:
    """One head's outputs [T, D] as KIVI computes them, a token at a time, from lists that are quantised as they fill."""
    outputs, keys, key_residual, values, value_residual = [], [], [], [], []
    for step, q in enumerate(query):
        key_residual.append(key[step])
        value_residual.append(value[step])
        weights = (torch.stack(keys + key_residual) @ q / q.shape[-1] ** 0.5).softmax(0)
        outputs.append(weights @ torch.stack(values + value_residual))
        if len(key_residual) == length:
            positions = torch.arange(step + 1 - length, step + 1)
            keys += method.key.restore(torch.stack(key_residual)[None], positions)[0]
            key_residual = []
        if len(value_residual) > length:
            oldest = value_residual.pop(0)
            values += method.value.restore(oldest[None, None], torch.tensor([step - length]))[0]
    return torch.stack(outputs)


def test_kivi_is_read_as_a_stream_reads_it() -> None:
    method = Kivi("", "", ChannelIntegers(2, 4), TokenIntegers(2, 8), residual=8)
    query, key, value = torch.randn(3, 1, 2, 29, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(29)

    def tap(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = method.restore(layer, key[0], value[0], positions)
        return keys[None], values[None]

    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=ATTENTION))
    model.set_attn_implementation = lambda name: None
    module = SimpleNamespace(layer_idx=0, is_causal=True, training=False)
    with tapped(model, tap, method.own_window):
        output, _ = ALL_ATTENTION_FUNCTIONS[ATTENTION](module, query, key, value, None)
    for head in range(2):
        streamed = stream(query[0, head], key[0, head], value[0, head], 8, method)
        torch.testing.assert_close(output[0, :, head], streamed)


def test_principal_components_are_those_of_the_models_own_cache(tmp_path) -> None:
    model, _ = load_model(str(tiny_model("llama", tmp_path / "model")), torch.float32)
    windows = torch.randint(3, 500, (3, 40), generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    ranks: list[Method] = list(rank_peers(model, windows, lambda: calls.append(1)))
    assert len(calls) == 3
    assert [method.bits_per_element(64, 32) for method in ranks] == [2, 4, 8, 12]
    caches = [model(window[None], use_cache=True).past_key_values for window in windows]
    for layer in range(3):
        pairs = [(cache.layers[layer].keys[0], cache.layers[layer].values[0]) for cache in caches]
        key, value = (torch.cat([x[:, FIRST_ORDINARY:] for x in kind], 1) for kind in zip(*pairs, strict=True))
        restored = ranks[1].restore(layer, key, value, torch.arange(key.shape[1]))
        for x, back in zip((key, value), restored, strict=True):
            spectrum = torch.linalg.svdvals(x - x.mean(1, keepdim=True)).square()
            lost = (x - back).square().sum((1, 2))
            torch.testing.assert_close(lost, spectrum[:, 8:].sum(1), rtol=1e-3, atol=0)

"""Block sizes of the two caches, and what the window's layer tells vLLM."""

from types import SimpleNamespace

import pytest
import torch

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving.window import WindowLayer
from vllm_kvsplice.serving.window_blocks import LARGEST_BLOCK, SLACK, TYPICAL_TOKENS, BlockSizes, block_sizes

SMOLLM = 30 * 2 * 3 * 64 * 2
WEIGHTS = [(SMOLLM * bits // 16, SMOLLM) for bits in (2, 3, 4, 8)] + [(1000, 900), (48, 12288), (7777, 12288)]


@pytest.mark.parametrize(
    ("bits", "window", "sizes"),
    [
        # 96 compressed tokens at 3 bits weigh as much as 18 exact ones: 1.2 MB for the three blocks of 32 tokens.
        (3, 32, BlockSizes(96, 16, 414720)),
        (4, 32, BlockSizes(64, 16, 368640)),
        (2, 128, BlockSizes(64, 8, 184320)),
    ],
)
def test_block_sizes_of_smollm(bits: int, window: int, sizes: BlockSizes) -> None:
    chosen = block_sizes(SMOLLM * bits // 16, SMOLLM, window, 32, None)
    assert chosen == sizes
    assert chosen.window_bytes(window) == (1 + -(-(window - 1) // sizes.raw)) * sizes.block_bytes


@pytest.mark.parametrize(("codes", "raw"), WEIGHTS)
@pytest.mark.parametrize("window", [1, 2, 17, 32, 1000])
@pytest.mark.parametrize("given", [None, 16, 48, 256])
def test_blocks_hold_their_tokens_and_waste_little(codes: int, raw: int, window: int, given: int | None) -> None:
    chosen = block_sizes(codes, raw, window, 32, given)
    assert chosen.codes == given or (given is None and chosen.codes % 32 == 0 and chosen.codes <= LARGEST_BLOCK)
    assert chosen.codes % chosen.raw == 0
    assert chosen.block_bytes == max(chosen.codes * codes, chosen.raw * raw)
    for other in range(1, chosen.codes + 1):
        if chosen.codes % other == 0:
            rival = BlockSizes(chosen.codes, other, max(chosen.codes * codes, other * raw))
            cost = rival.sequence_bytes(TYPICAL_TOKENS, window)
            assert chosen.sequence_bytes(TYPICAL_TOKENS, window) <= cost * SLACK


@pytest.mark.parametrize("window", [1, 2, 8, 16, 17, 32, 33])
@pytest.mark.parametrize("raw", [1, 8, 16])
def test_a_window_touches_no_more_blocks_than_it_is_told_to_cost(window: int, raw: int) -> None:
    touched = max(last // raw - max(0, last - window + 1) // raw + 1 for last in range(200))
    assert BlockSizes(96, raw, 1).window_bytes(window) >= touched
    assert BlockSizes(96, raw, 1).window_bytes(window) <= touched + 1


def test_a_pool_that_could_never_admit_a_request_is_refused() -> None:
    attention = SimpleNamespace(
        layer_name="model.layers.3.attn", num_kv_heads=2, head_size=8, kv_cache_torch_dtype=torch.float32
    )
    layer = WindowLayer(attention, tokens=20, block_size=4, hit_alignment=16, drafts=0)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=100, original_max_model_len=100),
        cache_config=SimpleNamespace(num_gpu_blocks=None),
        max_in_flight_tokens=32,
    )
    spec = layer.get_kv_cache_spec(config)
    # As where vLLM measures what graphs take.
    layer.bind_kv_cache(torch.empty(3, 2, 4, 16))
    config.cache_config.num_gpu_blocks = 20
    # 7 blocks of codes; before and after a step 19 exact tokens that may begin anywhere in one of 6 blocks; and nobody's.
    layer.bind_kv_cache(torch.empty(20, 2, 4, 16))
    assert layer.kv_cache.shape[0] == 20
    with pytest.raises(KVSpliceError, match=r"take 19 blocks .* there are 18; lower --max-model-len"):
        layer.bind_kv_cache(torch.empty(19, 2, 4, 16))
    # Told to cost six blocks of 4 tokens of 2 heads of 16 numbers of 4 bytes, and twice that where vLLM chooses the length.
    assert spec.max_memory_usage_bytes(config) == 6 * 4 * 2 * 16 * 4
    config.model_config.original_max_model_len = -1
    assert spec.max_memory_usage_bytes(config) == 12 * 4 * 2 * 16 * 4

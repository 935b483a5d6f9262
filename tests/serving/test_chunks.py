"""However a prompt is cut into steps, its answer is the same: vLLM's scheduler inside this process, cutting as told.

Over HTTP a server's chunk size is fixed at start; `test_smollm.py` has one such server. Here the model is tiny and random.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from calibration.pipeline import calibrate
from calibration.recipe import CalibrationConfig
from tests.models import TEXT, tiny_model, tiny_tokenizer
from tests.serving.inside import answers, vllm_inside
from tests.serving.requests import Answer, largest_difference
from vllm_kvsplice.engines import ENGINES
from vllm_kvsplice.engines.cpu import CpuEngine, instruction_sets

pytestmark = pytest.mark.server

LONGEST = 384
BLOCK = 32
WINDOW = 20
# Steps of one token take other matrix products than longer ones, so the last bit moves, on stock vLLM as here.
FLOOR = 0.00003
# With AMX attention too differs between a step of one token and longer ones, by far more than that (docs/cpu.md): what is
# read is tested without it.
EXACT = [isa for isa in instruction_sets() if isa != "amx"][:1]
# One flipped code on a random model; a window read wrongly moves them by 0.05 and more.
FLIPPED = 0.01


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("chunks")
    (folder / "text.txt").write_text(TEXT)
    model = tiny_model("llama", folder / "model")
    calibrate(
        str(model),
        model / "kvsplice",
        CalibrationConfig(bits=3, text=str(folder / "text.txt"), tokens=2048, context=128),
    )
    with pytest.MonkeyPatch.context() as patch:
        for isa in EXACT:
            patch.setitem(ENGINES, "cpu", CpuEngine(isa))
        with vllm_inside(
            model,
            max_model_len=LONGEST,
            max_num_batched_tokens=LONGEST,
            max_num_seqs=16,
            block_size=BLOCK,
            additional_config={"kvsplice": {"recent_window": WINDOW}},
        ) as engine:
            yield engine


def ask(
    engine: Any, prompts: list[list[int]], salt: str, chunk: int = LONGEST, prompt_logprobs: bool = True
) -> list[Answer]:
    """Greedy answers with at most `chunk` tokens in a step."""
    engine.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = chunk
    return answers(engine, prompts, prompt_logprobs=prompt_logprobs, salt=salt)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokens = tiny_tokenizer()(TEXT[:20000]).input_ids
    lengths = [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, *(BLOCK * n + edge for n in (1, 3, 7) for edge in (-1, 0, 1, 13))]
    return [tokens[61 * i :][:length] for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def whole(engine: Any, prompts: list[list[int]]) -> list[Answer]:
    return [ask(engine, [prompt], f"whole {i}")[0] for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 64])
def test_chunks_equal_the_whole(engine: Any, prompts: list[list[int]], whole: list[Answer], chunk: int) -> None:
    # Steps of one token are many.
    chosen = [i for i, prompt in enumerate(prompts) if len(prompt) < 100 * chunk]
    chunked = [ask(engine, [prompts[i]], f"{chunk} {i}", chunk)[0] for i in chosen]
    differences = sorted(largest_difference(whole[i], other) for i, other in zip(chosen, chunked, strict=True))
    assert differences[len(chosen) * 3 // 4] < FLOOR
    assert differences[-1] < FLIPPED


def test_prefix_hits_equal_misses_around_the_edges_of_blocks(
    engine: Any, prompts: list[list[int]], whole: list[Answer]
) -> None:
    for prompt in prompts:
        ask(engine, [prompt], "hit")
    for prompt, one in zip(prompts, whole, strict=True):
        hit = ask(engine, [prompt], "hit", prompt_logprobs=False)[0]
        # At least one token is computed, and a hit ends with a block.
        assert hit.cached_tokens == (len(prompt) - 1) // BLOCK * BLOCK
        assert largest_difference(one.without_prompt(), hit) < FLOOR


def test_loading_weights_again_changes_nothing(engine: Any, prompts: list[list[int]], whole: list[Answer]) -> None:
    engine.collective_rpc("reload_weights")
    for i in (4, len(prompts) - 1):
        assert largest_difference(whole[i], ask(engine, [prompts[i]], f"again {i}")[0]) < FLOOR


def test_mixed_steps_equal_lone_ones(engine: Any, prompts: list[list[int]], whole: list[Answer]) -> None:
    """Prompts in chunks beside answers under way, in both orders."""
    for order in (1, -1):
        together = ask(engine, prompts[::order], f"mixed {order}", 100)[::order]
        differences = sorted(largest_difference(one, other) for one, other in zip(whole, together, strict=True))
        assert differences[len(prompts) * 3 // 4] < FLOOR
        assert differences[-1] < FLIPPED

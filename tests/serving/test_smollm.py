"""The real model on the real server, over HTTP: proof of use, agreement with stock vLLM, and path independence.

Everything here runs in float32, where an answer that differs differs for a reason, and every check on a compressed server
has the same check on a stock one beside it. Between two ways of computing the same answer log-probabilities may move by
`SAME`, and where a code flips by `FLIPPED`: vLLM's own matrix products change their last bit with their shape, and a latent
may lie on a threshold (docs/codec.md, path independence). Tokens may differ only where the best two tie.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer

from benchmarks.server import Server, kvsplice_command, vllm_command
from calibration.models import load_model
from tests.serving import CACHE_BYTES
from tests.serving.requests import Answer, ask, ask_all, hf_prompt_logprobs, largest_difference
from vllm_kvsplice.artifact import load_artifact
from vllm_kvsplice.engines import DEFAULT_WINDOW

pytestmark = [pytest.mark.server, pytest.mark.model]

BLOCK = 32
COMMON = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--block-size", str(BLOCK))
# Chunks of 48 tokens, and so few blocks that requests in flight preempt each other.
CRAMPED = (*COMMON, "--max-num-batched-tokens", "48", "--max-num-seqs", "16", "--num-gpu-blocks-override", "52")
DRAFTS = json.dumps({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4})
HITS = "vllm:prefix_cache_hits_total"
# Three times what stock vLLM moves by.
SAME = 0.0001
FLIPPED = 0.05


@pytest.fixture(scope="module")
def prompts(smollm: Path) -> list[list[int]]:
    """Twenty prompts of the language reference; lengths sit on, before and after the edges of blocks."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    lengths = [BLOCK * blocks + edge for blocks in (1, 2, 3, 5, 7) for edge in (-1, 0, 1, 13)]
    chosen = [key for key in sorted(topics) if len(topics[key]) > 2000][: len(lengths)]
    return [tokenizer(topics[key][600:]).input_ids[:length] for key, length in zip(chosen, lengths, strict=True)]


@pytest.fixture(scope="module")
def servers(start: Callable[..., dict[str, Server]], smollm: Path, smollm_artifact: Path) -> dict[str, Server]:
    # The plain way, without `kvsplice serve`.
    section = json.dumps({"kvsplice": {"artifact": str(smollm_artifact)}})
    return start(
        {
            "stock": vllm_command(smollm, *COMMON),
            "four bits": vllm_command(smollm, *COMMON, "--attention-backend", "CUSTOM", "--additional-config", section),
            "cramped": kvsplice_command("serve", smollm, smollm_artifact, *CRAMPED),
            "drafting": kvsplice_command("serve", smollm, smollm_artifact, *COMMON, "--speculative-config", DRAFTS),
        }
    )


@pytest.fixture(scope="module")
def stock(servers: dict[str, Server]) -> Server:
    return servers["stock"]


@pytest.fixture(scope="module")
def four_bits(servers: dict[str, Server]) -> Server:
    return servers["four bits"]


@pytest.fixture(scope="module")
def alone(four_bits: Server, prompts: list[list[int]]) -> list[Answer]:
    """Every prompt's answer when the server has nothing else to do, nor any prefix to hit."""
    return [ask(four_bits, prompt, cache_salt=f"alone {index}") for index, prompt in enumerate(prompts)]


def test_every_layer_is_compressed_and_the_blocks_grow(stock: Server, four_bits: Server, smollm_artifact: Path) -> None:
    log = four_bits.log.read_text()
    assert re.search(r"KVSplice is in use: artifact \w{12}, 30 layers compressed and 0 dense", log)
    assert "KVSplice" not in stock.log.read_text()
    raw = re.search(rf"window 32 tokens: .* MB a sequence \(blocks of {BLOCK} compressed or (\d+) exact", log)
    assert raw
    artifact = load_artifact(smollm_artifact)
    # float32 takes 32 bits an element, here and on the stock server.
    block = max(BLOCK * artifact.bytes_per_token, int(raw[1]) * 2 * artifact.baseline_bytes_per_token)
    assert int(four_bits.cache_config()["num_gpu_blocks"]) == CACHE_BYTES // block
    assert four_bits.cache_tokens() / stock.cache_tokens() >= 6


def test_logprobs_are_those_of_this_artifact(
    four_bits: Server, stock: Server, smollm: Path, smollm_artifact: Path, prompts: list[list[int]]
) -> None:
    """The server computes what the Hugging Face path computes with the same artifact, and nothing else would pass."""
    model, _ = load_model(str(smollm), torch.float32)
    artifact = load_artifact(smollm_artifact)
    chosen = prompts[4:8] + prompts[-2:]
    answers = [ask(four_bits, prompt) for prompt in chosen]
    texts = [prompt + answer.tokens for prompt, answer in zip(chosen, answers, strict=True)]
    served = [torch.tensor(answer.prompt_logprobs + answer.logprobs) for answer in answers]
    expected = [torch.tensor(hf_prompt_logprobs(model, text, artifact)) for text in texts]
    uncompressed = [torch.tensor(ask(stock, text, max_tokens=1).prompt_logprobs) for text in texts]
    # The window hides the code from the first tokens. Of the rest some may carry other noise, because two implementations
    # of the model flip a code sooner or later (docs/codec.md).
    answered = len(answers[0].tokens)
    past = slice(DEFAULT_WINDOW, -answered)
    assert _difference(served, expected, past).median() < 1e-3
    assert _difference(uncompressed, expected, past).median() > 0.01
    for part in (past, slice(-answered, None)):
        print(_difference(served, expected, part).mean(), _difference(uncompressed, expected, part).mean())
        assert _difference(served, expected, part).mean() < _difference(uncompressed, expected, part).mean() / 5


def test_batched_answers_equal_lone_ones(four_bits: Server, alone: list[Answer], prompts: list[list[int]]) -> None:
    batched = ask_all(four_bits, prompts[:16], cache_salt="batch")
    assert max(largest_difference(one, other) for one, other in zip(alone, batched, strict=False)) < FLIPPED
    assert sum(one.tokens == other.tokens for one, other in zip(alone, batched, strict=False)) >= 13


def test_drafts_change_no_answer(servers: dict[str, Server], prompts: list[list[int]]) -> None:
    """Speculative decoding by prompt lookup; steps of several tokens, some of which are taken back."""
    repeating = [prompt + prompt[:-5] for prompt in prompts[:8]]
    drafting = servers["drafting"]
    plain, drafted = (ask_all(servers[name], repeating, max_tokens=32) for name in ("four bits", "drafting"))
    assert max(largest_difference(one, other) for one, other in zip(plain, drafted, strict=True)) < FLIPPED
    proposed, accepted = (
        drafting.metric(f"vllm:spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted")
    )
    assert 50 < accepted < proposed - 50


def test_prefix_hits_equal_misses(
    four_bits: Server, stock: Server, alone: list[Answer], prompts: list[list[int]]
) -> None:
    few, many = prompts[4:8], range(12)
    stock_alone = [ask(stock, prompt, cache_salt="first") for prompt in few]
    ours = four_bits, [prompts[i] for i in many], [alone[i] for i in many]
    for server, asked, expected in ((stock, few, stock_alone), ours):
        for prompt in asked:
            ask(server, prompt, max_tokens=1, cache_salt="shared")
        before = server.metric(HITS)
        # Log-probabilities of the prompt would make vLLM skip the cache, so only the answer is compared.
        hits = [ask(server, prompt, cache_salt="shared", prompt_logprobs=None) for prompt in asked]
        # At least one token is computed.
        assert server.metric(HITS) - before == sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in asked)
        moved = sorted(largest_difference(one.without_prompt(), hit) for one, hit in zip(expected, hits, strict=True))
        # One length in four leaves one token after a hit, which vLLM multiplies as a vector, in stock as well.
        assert moved[len(moved) * 3 // 4 - 1] < SAME
        assert moved[-1] < (SAME if server is stock else FLIPPED)


def test_prefixes_are_not_shared_across_salts(four_bits: Server, prompts: list[list[int]]) -> None:
    ask(four_bits, prompts[-1], cache_salt="one", prompt_logprobs=None)
    before = four_bits.metric(HITS)
    ask(four_bits, prompts[-1], cache_salt="another", prompt_logprobs=None)
    assert four_bits.metric(HITS) == before


def test_chunked_and_preempted_answers_equal_whole_ones(
    servers: dict[str, Server], alone: list[Answer], prompts: list[list[int]]
) -> None:
    cramped = servers["cramped"]
    chunked = [ask(cramped, prompt) for prompt in prompts[::3]]
    moved = sorted(largest_difference(one, other) for one, other in zip(alone[::3], chunked, strict=True))
    assert moved[len(moved) // 2] < SAME
    assert moved[-1] < FLIPPED
    crowd = ask_all(cramped, prompts[-8:], prompt_logprobs=None, max_tokens=48)
    assert cramped.metric("vllm:num_preemptions_total") > 0
    for one, crowded in zip(alone[-8:], crowd, strict=True):
        assert largest_difference(one.without_prompt(), crowded.first(len(one.tokens))) < FLIPPED


def test_bad_requests_are_refused_and_the_server_lives(
    four_bits: Server, alone: list[Answer], prompts: list[list[int]]
) -> None:
    """What a client can send must never end the engine."""
    limit = 1024
    fine = {"prompt": prompts[0], "max_tokens": 1}
    refused = [
        {"prompt": []},
        {"prompt": [1] * limit},
        {"prompt": [1] * (limit + 1)},
        {"prompt": [10**9]},
        {"prompt": [-1]},
        {**fine, "max_tokens": -1},
        {**fine, "n": 0},
        {**fine, "n": 10**6},
        {**fine, "temperature": -1},
        {**fine, "temperature": float("nan")},
        {**fine, "top_p": 2},
        {**fine, "top_k": -7},
        {**fine, "logprobs": 10**4},
        {**fine, "repetition_penalty": 0},
        {**fine, "presence_penalty": 9},
        {**fine, "stop": [""]},
        {**fine, "prompt_logprobs": 10**4},
        {**fine, "model": "nothing"},
        {"prompt": "x" * 200_000},
        {},
    ]
    accepted = [
        fine,
        {**fine, "prompt": [1]},
        {"prompt": [1] * (limit - 1), "max_tokens": 1},
        {**fine, "n": 3, "temperature": 1.0},
        {**fine, "max_tokens": 4, "presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 1.5},
        {**fine, "prompt_logprobs": 5},
        {**fine, "stop": ["e"], "max_tokens": 4},
        {"prompt": "\ud83d\ude00 text \x00", "max_tokens": 2},
        {"prompt": [prompts[0], prompts[1]], "max_tokens": 2},
    ]
    assert [four_bits.post("/v1/completions", body) // 100 for body in refused] == [4] * len(refused)
    assert [four_bits.post("/v1/completions", body) for body in accepted] == [200] * len(accepted)
    assert four_bits.post("/v1/completions", b"\xff\xfe not json") // 100 == 4
    assert largest_difference(alone[0], ask(four_bits, prompts[0])) < SAME


def test_cut_streams_leave_nothing_behind(four_bits: Server, prompts: list[list[int]]) -> None:
    client = OpenAI(base_url=f"{four_bits.url}/v1", api_key="none")
    name = client.models.list().data[0].id
    for prompt in prompts[:8]:
        stream = client.completions.create(model=name, prompt=prompt, max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 20
    while four_bits.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert four_bits.metric("vllm:num_requests_running") == 0
    assert four_bits.metric("vllm:num_requests_waiting") == 0
    assert four_bits.metric("vllm:kv_cache_usage_perc") == 0


def _difference(one: list[torch.Tensor], other: list[torch.Tensor], part: slice) -> torch.Tensor:
    """Absolute differences of log-probabilities over a part of every prompt."""
    return torch.cat([(a - b)[part].abs() for a, b in zip(one, other, strict=True)])

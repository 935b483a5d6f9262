"""Requests to a running server, and what it means that two answers agree."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import openai
import torch
from transformers import PreTrainedModel

from benchmarks.server import Server
from calibration.attention import Reading, tapped
from calibration.evaluate import compressing_tap
from vllm_kvsplice.artifact import Artifact
from vllm_kvsplice.engines import DEFAULT_WINDOW


@dataclass(frozen=True)
class Answer:
    """A greedy answer: token ids, log-probabilities of the best two in each place, the prompt's own, and its prefix hit."""

    tokens: list[int]
    best: list[dict[int, float]]
    prompt_logprobs: list[float]
    cached_tokens: int | None = None

    @property
    def logprobs(self) -> list[float]:
        return [best[token] for token, best in zip(self.tokens, self.best, strict=True)]

    def without_prompt(self) -> "Answer":
        return replace(self, prompt_logprobs=[])

    def first(self, count: int) -> "Answer":
        """The same answer, had it ended after `count` tokens."""
        return replace(self, tokens=self.tokens[:count], best=self.best[:count])


def ask(server: Server, prompt: Sequence[int], max_tokens: int = 16, **options: object) -> Answer:
    """Complete token ids `prompt` greedily over the OpenAI-compatible HTTP interface."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)
    model = client.models.list().data[0].id
    reply = client.completions.create(
        model=model,
        prompt=list(prompt),
        max_tokens=max_tokens,
        temperature=0,
        logprobs=2,
        extra_body={"prompt_logprobs": 0, "ignore_eos": True, "return_tokens_as_token_ids": True} | options,
    )
    choice = reply.choices[0]
    best = [{_token(name): value for name, value in top.items()} for top in choice.logprobs.top_logprobs]
    given = [next(iter(entry.values()))["logprob"] for entry in (choice.prompt_logprobs or [])[1:]]
    return Answer([_token(name) for name in choice.logprobs.tokens], best, given)


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def ask_all(server: Server, prompts: Sequence[Sequence[int]], **options: object) -> list[Answer]:
    """All prompts at once, so that the server batches them."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt, **options), prompts))


def largest_difference(one: Answer, other: Answer) -> float:
    """Largest difference of log-probabilities, over the prompt if there is one and the answer up to where it parts.

    Where the answers part, it is by how much `one` preferred its token to the other's, and infinite if that is not
    among its best two.
    """
    pairs = list(zip(one.prompt_logprobs, other.prompt_logprobs, strict=True))
    for a, b, best, rival in zip(one.tokens, other.tokens, one.best, other.best, strict=True):
        pairs.append((best[a], best.get(b, -math.inf) if a != b else rival[b]))
        if a != b:
            break
    return largest(pairs)


def largest(pairs: Sequence[tuple[float, float]]) -> float:
    return max((abs(a - b) for a, b in pairs), default=0.0)


@torch.no_grad()
def hf_prompt_logprobs(
    model: PreTrainedModel, prompt: list[int], artifact: Artifact | None, window: int = DEFAULT_WINDOW
) -> list[float]:
    """Log-probabilities of a prompt's tokens but the first, by the Hugging Face path, without artifact uncompressed."""
    codecs = {index: artifact.layer(index) for index in artifact.compressed_layers} if artifact else {}
    tokens = torch.tensor(prompt)
    with tapped(model, compressing_tap(codecs, "serving"), Reading(window)):
        logits = model(tokens[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0].tolist()

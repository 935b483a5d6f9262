"""Requests to a running server, and what it means that two answers agree."""

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
from vllm_kvsplice.serving.settings import DEFAULT_WINDOW


@dataclass(frozen=True)
class Answer:
    """A greedy answer: tokens as text, their log-probabilities, the runner-up's, the prompt's own, and its prefix hit."""

    tokens: list[str]
    logprobs: list[float]
    second: list[float]
    prompt_logprobs: list[float]
    cached_tokens: int | None = None

    def without_prompt(self) -> "Answer":
        return replace(self, prompt_logprobs=[])

    def first(self, count: int) -> "Answer":
        """The same answer, had it ended after `count` tokens."""
        return replace(self, tokens=self.tokens[:count], logprobs=self.logprobs[:count], second=self.second[:count])


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
        extra_body={"prompt_logprobs": 0, "ignore_eos": True} | options,
    )
    choice = reply.choices[0]
    # Two tokens that print alike share an entry.
    second = [sorted(top.values())[-2:][0] for top in choice.logprobs.top_logprobs]
    given = [next(iter(entry.values()))["logprob"] for entry in (choice.prompt_logprobs or [])[1:]]
    return Answer(choice.logprobs.tokens, choice.logprobs.token_logprobs, second, given)


def ask_all(server: Server, prompts: Sequence[Sequence[int]], **options: object) -> list[Answer]:
    """All prompts at once, so that the server batches them."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt, **options), prompts))


def largest_difference(one: Answer, other: Answer) -> float:
    """Largest difference of log-probabilities, over the prompt if there is one and the answer up to where it parts.

    Where the answers part, the two best tokens must be a tie within the difference itself; otherwise it is infinite.
    """
    pairs = list(zip(one.prompt_logprobs, other.prompt_logprobs, strict=True))
    for index, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)):
        if a != b:
            gap = one.logprobs[index] - one.second[index]
            return max(largest(pairs), gap)
        pairs.append((one.logprobs[index], other.logprobs[index]))
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

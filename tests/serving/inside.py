"""vLLM inside the test's process: no HTTP, none of three processes that each import vLLM, and a scheduler at hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving import CACHE_BYTES
from tests.serving.requests import Answer


@contextmanager
def vllm_inside(model: Path, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM` of `model`, eager and in float32, compressed by the artifact inside the model's directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        always = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": CACHE_BYTES}
        engine = LLM(str(model), attention_backend="CUSTOM", **always, **options)
        try:
            yield engine
        finally:
            engine.llm_engine.engine_core.shutdown()


def answers(
    engine: Any, prompts: Sequence[list[int]], max_tokens: int = 8, prompt_logprobs: bool = True, salt: str = ""
) -> list[Answer]:
    """Greedy answers to all prompts at once; each has a prefix cache of its own, by `salt` and its place."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        logprobs=2,
        prompt_logprobs=0 if prompt_logprobs else None,
        ignore_eos=True,
    )
    requests = [{"prompt_token_ids": prompt, "cache_salt": f"{salt}-{i}"} for i, prompt in enumerate(prompts)]
    made = []
    for reply in engine.generate(requests, sampling, use_tqdm=False):
        output = reply.outputs[0]
        best = [{token: entry.logprob for token, entry in step.items()} for step in output.logprobs]
        given = [next(iter(step.values())).logprob for step in (reply.prompt_logprobs or [])[1:]]
        made.append(Answer(list(output.token_ids), best, given, reply.num_cached_tokens))
    return made

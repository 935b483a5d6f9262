"""The real SmolLM2 with its packed cache: what evaluation reads, in batches and in steps, in a fraction of the memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from calibration.attention import Reading, tapped
from calibration.evaluate import compressing_tap
from calibration.models import load_model
from calibration.text import token_windows
from tests.models import TEXT
from vllm_kvsplice.artifact import Artifact, load_artifact
from vllm_kvsplice.engines import DEFAULT_WINDOW
from vllm_kvsplice.huggingface import CompressedKVModelWrapper

pytestmark = pytest.mark.model

TOKENS = 160


@pytest.fixture(scope="module")
def model(smollm: Path) -> PreTrainedModel:
    return load_model(str(smollm), torch.float32)[0]


@pytest.fixture(scope="module")
def artifact(smollm_artifact: Path) -> Artifact:
    return load_artifact(smollm_artifact)


@pytest.fixture(scope="module")
def tokens(smollm: Path) -> Tensor:
    return token_windows(AutoTokenizer.from_pretrained(smollm), TEXT, 2, TOKENS)


@torch.no_grad()
def test_logits_are_those_of_evaluation(model: PreTrainedModel, artifact: Artifact, tokens: Tensor) -> None:
    compressed = CompressedKVModelWrapper(model, artifact)
    plain = model(tokens).logits
    with tapped(model, compressing_tap(artifact.codecs, "serving"), Reading(DEFAULT_WINDOW)):
        expected = model(tokens, use_cache=False).logits
    cache = compressed.new_cache()
    chunked = torch.cat([compressed(step, past_key_values=cache).logits for step in tokens.split([100, 1, 59], 1)], 1)
    for given in (compressed(tokens).logits, chunked):
        # A code that flips moves a few logits by more (docs/codec.md).
        assert (given - expected).abs().median() < 1e-3
        assert (given - expected).abs().mean() < (plain - expected).abs().mean() / 5


def test_a_batch_answers_like_its_rows(model: PreTrainedModel, artifact: Artifact, tokens: Tensor) -> None:
    compressed = CompressedKVModelWrapper(model, artifact)
    rows = [tokens[0, :90], tokens[1, :57]]
    padded = torch.stack([torch.nn.functional.pad(row, (90 - len(row), 0)) for row in rows])
    mask = torch.tensor([[0] * (90 - len(row)) + [1] * len(row) for row in rows])
    together = compressed.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 90:]
    for row, answer in zip(rows, together, strict=True):
        alone = compressed.generate(row[None], max_new_tokens=8, do_sample=False)[0, len(row) :]
        assert alone.tolist() == answer[: len(alone)].tolist()


def test_memory_is_a_fraction(model: PreTrainedModel, artifact: Artifact, tokens: Tensor) -> None:
    cache = CompressedKVModelWrapper(model, artifact).new_cache()
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    dense = tokens.numel() * artifact.baseline_bytes_per_token * 2
    window = len(tokens) * (DEFAULT_WINDOW - 1) * artifact.baseline_bytes_per_token * 2
    # The positions of tokens take four bytes each.
    assert cache.nbytes == tokens.numel() * (artifact.bytes_per_token + 4) + window < dense / 2

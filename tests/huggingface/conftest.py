"""Tiny random models with 4-bit artifacts, each calibrated once, and what it means that two logits agree."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibration.models import load_model
from calibration.pipeline import calibrate
from calibration.recipe import CalibrationConfig
from calibration.text import token_windows
from tests.models import TEXT, tiny_model
from vllm_kvsplice.artifact import Artifact


class Tiny(NamedTuple):
    """A model in float32, its artifact, and token ids [4, 96] that calibration never saw."""

    directory: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    artifact: Artifact
    tokens: Tensor


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    folder = tmp_path_factory.mktemp("huggingface")
    (folder / "text.txt").write_text(TEXT)
    recipe = CalibrationConfig(bits=4, text=str(folder / "text.txt"), tokens=1024, context=64)

    @cache
    def make(family: str) -> Tiny:
        directory = tiny_model(family, folder / family)
        artifact = calibrate(str(directory), directory / "kvsplice", recipe)
        model, tokenizer = load_model(str(directory), torch.float32)
        return Tiny(directory, model, tokenizer, artifact, token_windows(tokenizer, TEXT[-4000:], 4, 96))

    return make


@pytest.fixture
def llama(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("llama")

"""Other architectures and ways of serving, on tiny random models: the server computes what the Hugging Face path does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.server import Server, kvsplice_command
from calibration.models import load_model
from calibration.pipeline import calibrate
from calibration.recipe import CalibrationConfig
from tests.engines.device import OnDevice
from tests.models import TEXT, tiny_model, tiny_tokenizer
from tests.serving.inside import answers, vllm_inside
from tests.serving.requests import Answer, ask, ask_all, hf_prompt_logprobs, largest_difference
from vllm_kvsplice.artifact import load_artifact
from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines import DEFAULT_WINDOW, ENGINES

pytestmark = pytest.mark.server

LENGTH = 384
COMMON = ("--dtype", "float32", "--max-model-len", str(LENGTH))
# Family -> options of its server.
SERVED = {
    "llama": (*COMMON, "--block-size", "16"),
    "smollm3": (*COMMON, "--enforce-eager", "--tensor-parallel-size", "2"),
}
SERVED_NAMES = {"llama": "llama, compiled", "smollm3": "smollm3, a layer without rotation, two ranks"}
# Family -> options of vLLM in this process, because HTTP is the same for all.
INSIDE: dict[str, dict[str, int]] = {
    "gpt2": {},
    "glm4": {},
    # So few blocks that each is soon used by layers of both kinds.
    "gemma3": {"num_gpu_blocks_override": 96},
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokens = tiny_tokenizer()(TEXT[:20000]).input_ids
    return [tokens[start : start + length] for start, length in ((0, 2), (50, 31), (300, 128), (700, 250))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of every family with its artifact inside, where the server looks for it."""
    folder = tmp_path_factory.mktemp("models")
    text = folder / "text.txt"
    text.write_text(TEXT)
    made = {family: tiny_model(family, folder / family) for family in (*SERVED, *INSIDE)}
    for model in made.values():
        calibrate(str(model), model / "kvsplice", CalibrationConfig(bits=4, text=str(text), tokens=2048, context=128))
    return made


@pytest.fixture(scope="module")
def servers(start: Callable[..., dict[str, Server]], models: dict[str, Path]) -> dict[str, Server]:
    commands = {family: kvsplice_command("serve", models[family], *options) for family, options in SERVED.items()}
    # One core for each of two ranks; without it vLLM wants a NUMA node for each.
    commands["smollm3"] = ["env", "VLLM_CPU_OMP_THREADS_BIND=0|1", *commands["smollm3"]]
    return start(commands)


@pytest.mark.parametrize("family", SERVED, ids=SERVED_NAMES.get)
def test_server_computes_what_the_hugging_face_path_does(
    family: str, servers: dict[str, Server], models: dict[str, Path], prompts: list[list[int]]
) -> None:
    server = servers[family]
    assert "KVSplice is in use" in server.log.read_text()
    check(models[family], prompts, [ask(server, prompt) for prompt in prompts], ask_all(server, prompts))


@pytest.mark.parametrize("family", INSIDE)
def test_vllm_computes_what_the_hugging_face_path_does(
    family: str, models: dict[str, Path], prompts: list[list[int]]
) -> None:
    with vllm_inside(models[family], max_model_len=LENGTH, **INSIDE[family]) as engine:
        section = engine.llm_engine.vllm_config.additional_config["kvsplice"]
        assert section["digest"] == load_artifact(models[family] / "kvsplice").digest
        alone = [answers(engine, [prompt], 16, salt=f"{i}")[0] for i, prompt in enumerate(prompts)]
        check(models[family], prompts, alone, answers(engine, prompts, 16, salt="batch"))


@pytest.mark.triton
def test_vllm_computes_the_same_with_the_gpus_kernels(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: list[list[int]]
) -> None:
    """Interpreted where there is no GPU, in steps of 96 tokens: the second holds two answers and the end of a prompt."""
    attended = []

    class Recording(OnDevice):
        def attend(self, codec: LayerCodec, query: torch.Tensor, *rest: Any) -> torch.Tensor:
            attended.append((len(query), len(rest[1].seq_lens)))
            return super().attend(codec, query, *rest)

    monkeypatch.setitem(ENGINES, "triton", Recording())
    settings = {"kvsplice": {"engine": "triton"}}
    with vllm_inside(
        models["llama"], max_model_len=LENGTH, max_num_batched_tokens=96, additional_config=settings
    ) as engine:
        found = answers(engine, prompts[:3], 2)
    assert {(2, 2), (65, 1)} <= set(attended)
    model, _ = load_model(str(models["llama"]), torch.float32)
    artifact = load_artifact(models["llama"] / "kvsplice")
    for prompt, answer in zip(prompts, found, strict=False):
        expected = torch.tensor(hf_prompt_logprobs(model, prompt, artifact, DEFAULT_WINDOW))
        assert (torch.tensor(answer.prompt_logprobs) - expected).abs().median() < 0.01


def check(directory: Path, prompts: list[list[int]], alone: list[Answer], batched: list[Answer]) -> None:
    """Answers agree with the Hugging Face path's, which no uncompressed server's do, and with each other."""
    model, _ = load_model(str(directory), torch.float32)
    artifact = load_artifact(directory / "kvsplice")
    # Beside sliding layers there is no exact window.
    window = DEFAULT_WINDOW if artifact.covers_all_layers else 0
    for prompt, answer in zip(prompts, alone, strict=True):
        uncompressed = torch.tensor(hf_prompt_logprobs(model, prompt, None))
        expected = torch.tensor(hf_prompt_logprobs(model, prompt, artifact, window))
        served = torch.tensor(answer.prompt_logprobs)
        # The median, because a code that flips between two implementations moves a few log-probabilities by more.
        assert (served - expected).abs().median() < 0.01
        # What fits the window is not compressed for any of its own queries.
        if len(prompt) > 2 * DEFAULT_WINDOW:
            assert (served - expected).abs().mean() < (served - uncompressed).abs().mean() / 2
    for one, other in zip(alone, batched, strict=True):
        # What is left of path independence in a batch (docs/codec.md), on models whose logits spread widely.
        assert largest_difference(one, other) < 0.5

"""What a server refuses at start: one sentence with its reason, before any weight is loaded and any port is open."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

import vllm_kvsplice
from benchmarks.server import kvsplice_command, vllm_command
from calibration.pipeline import calibrate
from calibration.recipe import CalibrationConfig
from tests.models import TEXT, tiny_model
from vllm_kvsplice.artifact import make_artifact, save_artifact
from vllm_kvsplice.engines import DEFAULT_WINDOW, ENGINES
from vllm_kvsplice.engines.triton import TritonEngine
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving import plugin
from vllm_kvsplice.serving.backend import KVSpliceBackend, KVSpliceImpl

CUSTOM = "CUSTOM"
Ended = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its artifact inside."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "text.txt").write_text(TEXT)
    model = tiny_model("llama", folder / "model")
    recipe = CalibrationConfig(bits=4, text=str(folder / "text.txt"), tokens=512, context=128)
    calibrate(str(model), model / "kvsplice", recipe)
    return model


@pytest.fixture
def configure(served: Path) -> Callable[..., Any]:
    """vLLM's configuration for the tiny model under the given engine arguments."""
    plugin.register()

    def build(**options: Any) -> Any:
        arguments = {"model": str(served), "attention_backend": CUSTOM, "max_model_len": 256, "dtype": "float32"}
        return EngineArgs(**{**arguments, **options}).create_engine_config()

    return build


def test_the_digest_enters_the_configuration(configure: Callable[..., Any], served: Path) -> None:
    section = configure().additional_config["kvsplice"]
    assert section["digest"] == plugin.open_artifact(served / "kvsplice", None).digest
    assert configure(additional_config={"other": 1}).additional_config["other"] == 1


@pytest.mark.parametrize(
    ("section", "window"), [({}, DEFAULT_WINDOW), ({"recent_window": 5}, 5), ({"recent_window": 0}, 0)]
)
def test_the_window_and_its_blocks_are_filled_in(
    configure: Callable[..., Any], section: dict[str, Any], window: int
) -> None:
    config = configure(additional_config={"kvsplice": section})
    filled = config.additional_config["kvsplice"]
    assert filled["recent_window"] == window
    assert ("window_block" in filled) is (window > 0)
    if window:
        assert config.cache_config.block_size % filled["window_block"] == 0
        assert config.cache_config.block_size % plugin.WINDOWED_BLOCK_MULTIPLE == 0


@pytest.mark.parametrize("window", [0, 5, DEFAULT_WINDOW])
def test_blocks_suit_the_gpu_engine_s_kernels(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setitem(ENGINES, "triton", TritonEngine())
    config = configure(additional_config={"kvsplice": {"engine": "triton", "recent_window": window}})
    assert config.cache_config.block_size % plugin.GPU_BLOCK_MULTIPLE == 0
    assert config.cache_config.user_specified_block_size


@pytest.mark.parametrize(("window", "warnings"), [(DEFAULT_WINDOW, 0), (DEFAULT_WINDOW - 1, 1)])
def test_a_window_smaller_than_the_artifact_was_made_for_is_told(
    configure: Callable[..., Any],
    served: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    warnings: int,
) -> None:
    artifact = plugin.open_artifact(served / "kvsplice", None)
    origin = artifact.manifest.provenance.model_copy(update={"recent": DEFAULT_WINDOW})
    made = make_artifact(artifact.manifest.model_copy(update={"provenance": origin}), artifact.tensors)
    save_artifact(made, tmp_path / "beside")
    told: list[str] = []
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *values: told.append(text % values))
    configure(additional_config={"kvsplice": {"artifact": str(tmp_path / "beside"), "recent_window": window}})
    assert len(told) == warnings
    assert all("window of 32 tokens" in text and "--recent 31" in text for text in told)


def test_the_user_s_block_size_is_kept(configure: Callable[..., Any]) -> None:
    config = configure(block_size=48)
    assert config.cache_config.block_size == 48
    assert 48 % config.additional_config["kvsplice"]["window_block"] == 0


def test_what_a_start_filled_in_is_no_way_around_checks(configure: Callable[..., Any]) -> None:
    """vLLM prints the configuration, so its users may hand in all of it."""
    section = configure().additional_config["kvsplice"]
    with pytest.raises(KVSpliceError, match=r"--block-size 48 is not a multiple"):
        configure(additional_config={"kvsplice": section | {"window_block": 32}}, block_size=48)
    with pytest.raises(KVSpliceError, match=r"bfloat16"):
        configure(additional_config={"kvsplice": section}, kv_cache_dtype="fp8")
    partly = {"kvsplice": {"digest": section["digest"]}}
    assert configure(additional_config=partly).additional_config["kvsplice"]["window_block"] == section["window_block"]


def test_checking_again_changes_nothing(configure: Callable[..., Any]) -> None:
    """The engine's process checks the configuration anew after it has set another block size."""
    config = configure()
    before = config.additional_config
    config.cache_config.block_size = 8
    plugin.prepare(config)
    assert config.additional_config == before


def test_models_with_dense_layers_have_no_window(configure: Callable[..., Any], served: Path, tmp_path: Path) -> None:
    artifact = plugin.open_artifact(served / "kvsplice", None)
    layers = (None, *artifact.manifest.layers[1:])
    tensors = {n: t[1:] if t.shape[0] == 3 and "." in n else t for n, t in artifact.tensors.items()}
    for kind in ("key", "value"):
        dropped = sum(1 << w for head in getattr(artifact.manifest.layers[0], kind) for w in head if w)
        tensors[f"{kind}.levels"] = artifact.tensors[f"{kind}.levels"][dropped:]
    save_artifact(make_artifact(artifact.manifest.model_copy(update={"layers": layers}), tensors), tmp_path / "partly")
    section = {"artifact": str(tmp_path / "partly")}
    config = configure(additional_config={"kvsplice": section})
    assert config.additional_config["kvsplice"]["recent_window"] == 0
    with pytest.raises(KVSpliceError, match=r"sliding-window layers; set recent_window to 0"):
        configure(additional_config={"kvsplice": section | {"recent_window": 8}})
    with pytest.raises(KVSpliceError, match=r"drop --disable-sliding-window"):
        configure(additional_config={"kvsplice": section}, disable_sliding_window=True)


BY_KIND = {"backend": CUSTOM, "backend_per_kind": {"full_attention": "TRITON_ATTN"}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "drafts of a model",
        {"speculative_config": {"method": "custom_class", "model": "some.Drafter", "num_speculative_tokens": 2}},
        "--speculative-config.method ngram",
    ),
    (
        "connector",
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "--kv-transfer-config",
    ),
    ("cache dtype", {"kv_cache_dtype": "fp8"}, r"\(fp8\); use --kv-cache-dtype bfloat16"),
    ("backends by kind", {"attention_backend": None, "attention_config": BY_KIND}, "backend_per_kind"),
    ("block size", {"block_size": 24}, "--block-size 24"),
    ("ranks", {"tensor_parallel_size": 3}, "3 ranks|divisible"),
    ("pipeline", {"pipeline_parallel_size": 2}, "use --tensor-parallel-size"),
    ("exact prefill alone", {"additional_config": {"kvsplice": {"prefill": "exact", "recent_window": 0}}}, "above 0"),
    ("no hybrid manager", {"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
    ("unknown setting", {"additional_config": {"kvsplice": {"artefact": "x"}}}, "kvsplice.artefact"),
    ("unknown engine", {"additional_config": {"kvsplice": {"engine": "warp"}}}, "engine 'warp' is unknown"),
    ("missing artifact", {"additional_config": {"kvsplice": {"artifact": "/nowhere"}}}, "kvsplice calibrate"),
    (
        "only half asked for",
        {"attention_backend": None, "additional_config": {"kvsplice": {}}},
        "--attention-backend CUSTOM",
    ),
]


@pytest.mark.parametrize(("options", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refusals_name_their_reason(configure: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises((KVSpliceError, ValueError), match=message):
        configure(**options)


def test_another_model_s_artifact_is_refused(configure: Callable[..., Any], served: Path, tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path / "other", num_hidden_layers=2)
    section = {"kvsplice": {"artifact": str(served / "kvsplice")}}
    with pytest.raises(KVSpliceError, match=r"another model.*num_layers 3 instead of 2.*kvsplice calibrate"):
        configure(model=str(other), additional_config=section)


def test_an_untested_vllm_is_refused_unless_allowed(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "vllm_version", lambda: "0.99.0")
    with pytest.raises(KVSpliceError, match=r"vLLM 0\.99\.0 is untested"):
        configure()
    monkeypatch.setenv(plugin.UNTESTED_VARIABLE, "1")
    configure()


def test_nothing_changes_unless_asked_for(configure: Callable[..., Any]) -> None:
    config = configure(attention_backend=None, additional_config={})
    assert config.additional_config == {}
    assert not plugin.selected(config)


def test_registering_twice_wraps_once() -> None:
    plugin.register()
    before = type(current_platform).get_attn_backend_cls
    vllm_kvsplice.register()
    assert type(current_platform).get_attn_backend_cls == before
    assert AttentionBackendEnum.CUSTOM.get_class() is KVSpliceBackend


SECTION: dict[str, Any] = {"additional_config": {"kvsplice": {}}}


def test_a_plugin_that_fails_ends_no_server_but_those_that_ask_for_it(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM calls a plugin unguarded, in every environment that has it installed."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "check_and_update_config", platform.check_and_update_config)
    monkeypatch.setitem(sys.modules, "vllm_kvsplice.serving.plugin", None)
    vllm_kvsplice.register()
    EngineArgs(str(served), max_model_len=256).create_engine_config()
    for path, asking in product((None, plugin.BACKEND_PATH), ({"attention_backend": CUSTOM}, SECTION)):
        monkeypatch.setattr(AttentionBackendEnum.CUSTOM, "get_path", lambda path=path: path, raising=False)
        with pytest.raises(KVSpliceError, match=r"does not load \(ModuleNotFoundError: .*kvsplice doctor"):
            EngineArgs(str(served), max_model_len=256, **asking).create_engine_config()


@pytest.mark.parametrize(
    ("feature", "ours"), [({}, True), ({"has_sliding_window": True}, False), ({"attn_type": "encoder_only"}, False)]
)
def test_layers_it_does_not_cover_go_to_the_stock_backend(feature: dict[str, Any], ours: bool) -> None:
    plugin.register()
    selector = AttentionSelectorConfig(
        head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None, **feature
    )
    chosen = current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, selector, num_heads=9)
    assert (chosen == plugin.BACKEND_PATH) is ours


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("alibi_slopes", [0.5]),
        ("sliding_window", 64),
        ("kv_cache_dtype", "fp8"),
        ("logits_soft_cap", 30.0),
        ("attn_type", "encoder"),
        ("kv_sharing_target_layer_name", "layer.0"),
        ("sinks", torch.zeros(4)),
        ("something_new", 1),
    ],
)
def test_attention_it_does_not_implement_is_refused(argument: str, value: object) -> None:
    with pytest.raises(KVSpliceError, match="which KVSplice does not support"):
        KVSpliceImpl(4, 32, 0.1, 2, **{argument: value})


def test_permissive_defaults_are_narrowed() -> None:
    assert not KVSpliceBackend.supports_kv_connector()
    assert not KVSpliceBackend.supports_device_cpu_query_lens_mismatch()
    assert not KVSpliceBackend.supports_sliding_window()
    assert not KVSpliceBackend.supports_sink()
    assert not KVSpliceBackend.supports_head_size(60)
    assert not KVSpliceBackend.supports_block_size(24)
    assert KVSpliceBackend.supports_kv_cache_dtype("fp8") is False
    assert KVSpliceBackend.forward_includes_kv_cache_update is False


def test_shape_is_read_the_same_with_and_without_vllm(configure: Callable[..., Any], served: Path) -> None:
    plugin.open_artifact(served / "kvsplice", None).check_model(AutoConfig.from_pretrained(served))
    plugin.open_artifact(served / "kvsplice", None).check_model(configure().model_config.hf_config)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without an artifact."""
    return tiny_model("llama", tmp_path_factory.mktemp("bare") / "model")


@pytest.fixture(scope="module")
def stopped(served: Path, bare: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Servers that end by themselves, run together: two without an artifact, two with a plugin that does not load."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "sitecustomize.py").write_text("import sys; sys.modules['vllm_kvsplice.serving.plugin'] = None\n")
    runs: dict[str, tuple[list[str], dict[str, str]]] = {
        "vllm": (vllm_command(bare, "--attention-backend", CUSTOM), {}),
        "kvsplice": (kvsplice_command("serve", bare), {}),
        "left out": (kvsplice_command("serve", served), {"VLLM_PLUGINS": "something_else"}),
        "broken": (kvsplice_command("serve", served), {"PYTHONPATH": str(folder)}),
    }

    def run(command: list[str], variables: dict[str, str]) -> Ended:
        environment = os.environ | variables
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)

    with ThreadPoolExecutor(len(runs)) as pool:
        return dict(zip(runs, pool.map(run, *zip(*runs.values(), strict=True)), strict=True))


@pytest.mark.server
@pytest.mark.parametrize("name", ["vllm", "kvsplice"])
def test_a_server_without_an_artifact_stops_with_one_sentence(name: str, bare: Path, stopped: dict[str, Ended]) -> None:
    run = stopped[name]
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert (
        last
        == f"kvsplice: no KVSplice artifact for {bare}; make one with: kvsplice calibrate {bare} --out {bare}/kvsplice"
    )
    assert "Traceback" not in run.stderr


@pytest.mark.server
@pytest.mark.parametrize("name", ["left out", "broken"])
def test_kvsplice_serve_never_serves_uncompressed(name: str, stopped: dict[str, Ended]) -> None:
    """vLLM logs a plugin that does not load and goes on without; `kvsplice serve` must not."""
    run = stopped[name]
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("kvsplice: ")

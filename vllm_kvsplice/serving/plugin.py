"""The backend in vLLM's lists, and every reason for which a server refuses to start.

vLLM's CPU platform ignores ``--attention-backend CUSTOM``, so the platform's choice of backend is wrapped. Its
configuration check is wrapped too: it runs in the first process, before any weight is loaded, which is where a user should
learn what is wrong. Both wrappers pass everything through unless the configuration asks for KVSplice.
"""

import os
from functools import lru_cache
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_kvsplice.artifact import Artifact
from vllm_kvsplice.doctor import TESTED_VLLM, vllm_version
from vllm_kvsplice.engines import DEFAULT_WINDOW, LARGEST_HEAD
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.hub import locate_artifact
from vllm_kvsplice.serving.registration import NAMESPACE, print_without_traceback
from vllm_kvsplice.serving.settings import Settings, open_artifact, read_settings
from vllm_kvsplice.serving.window_blocks import BlockSizes, block_sizes, register_window_spec

BACKEND_PATH = "vllm_kvsplice.serving.backend.KVSpliceBackend"
# A page of N tokens keeps every byte plane aligned to N; vector loads want at least this many.
BLOCK_MULTIPLE = 16
# vLLM's CPU platform warns of block sizes that are no multiple of 32.
WINDOWED_BLOCK_MULTIPLE = 32
# The GPU engine's kernels take 64 tokens of a block at a time; of shorter blocks they take fewer, and are slower.
GPU_BLOCK_MULTIPLE = 64
# Ways of speculative decoding that find drafts in the text itself; others have layers and a cache of their own.
DRAFTS_WITHOUT_CACHE = ("ngram",)
UNTESTED_VARIABLE = "VLLM_KVSPLICE_ALLOW_UNTESTED"
_WRAPPED = "_kvsplice_wrapped"

logger = init_logger("vllm.kvsplice")


def register() -> None:
    """Make the backend selectable as CUSTOM. Safe to call again."""
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    register_window_spec()
    platform: Any = type(current_platform)
    if not getattr(platform, _WRAPPED, False):
        _wrap_backend_choice(platform)
        _wrap_config_check(platform)
        setattr(platform, _WRAPPED, True)


def selected(vllm_config: VllmConfig) -> bool:
    """Whether this configuration asks for KVSplice; raises `KVSpliceError` when it does so by half."""
    backend = vllm_config.attention_config.backend
    if backend is AttentionBackendEnum.CUSTOM:
        return backend.get_path() == BACKEND_PATH
    configured = isinstance(vllm_config.additional_config, dict) and NAMESPACE in vllm_config.additional_config
    if configured:
        raise KVSpliceError(
            "additional_config asks for KVSplice, but another attention backend is selected and the cache would stay "
            "uncompressed; add: --attention-backend CUSTOM"
        )
    return False


def served_artifact(vllm_config: VllmConfig) -> tuple[Settings, Artifact]:
    """Settings and checked artifact of a configuration for which `selected` holds."""
    settings = read_settings(vllm_config.additional_config)
    directory = _located(settings.artifact, vllm_config.model_config.model)
    return settings, open_artifact(directory, settings.digest)


# Once a process: every layer asks, and a name on the Hub would be looked up each time.
_located = lru_cache(locate_artifact)


def prepare(vllm_config: VllmConfig) -> None:
    """Check a configuration that asks for KVSplice and write into it what follows: digest, window, block sizes.

    vLLM checks copies again in every process, the engine's with the smallest block size of the groups; what was written
    the first time stays.

    Raises:
        KVSpliceError: it cannot be served; the message says why and what to change.

    """
    settings, artifact = served_artifact(vllm_config)
    artifact.check_model(vllm_config.model_config.hf_config)
    if settings.recent_window is None:
        window = DEFAULT_WINDOW if artifact.covers_all_layers else 0
        settings = settings.model_copy(update={"recent_window": window})
    reasons = [reason for present, reason in _refusals(vllm_config, settings, artifact) if present]
    if reasons:
        raise KVSpliceError(f"KVSplice cannot serve this configuration: {'; '.join(reasons)}")
    if settings.is_filled_in:
        return
    if vllm_config.lora_config is not None:
        logger.warning("KVSplice was calibrated without adapters; those that change keys or values cost more quality.")
    made_for = artifact.manifest.provenance.recent
    assert settings.recent_window is not None
    if settings.recent_window < made_for:
        logger.warning(
            "KVSplice: the artifact was made to be read beside an exact window of %d tokens and costs more quality beside "
            "%d; make another with: kvsplice calibrate MODEL --out DIR --recent %d",
            *(made_for, settings.recent_window, settings.recent_window),
        )
    filled_in: dict[str, Any] = {"digest": artifact.digest}
    cache = vllm_config.cache_config
    given_size = cache.block_size if cache.user_specified_block_size else None
    if settings.recent_window:
        sizes = chosen_block_sizes(vllm_config, settings, given_size)
        filled_in["window_block"] = sizes.raw
        given_size = sizes.codes
    elif settings.engine == "triton":
        given_size = given_size or GPU_BLOCK_MULTIPLE
    if given_size:
        cache.block_size = given_size
        # Otherwise the platform puts its own default in its place.
        cache.user_specified_block_size = True
    section = settings.model_dump(exclude_none=True) | filled_in
    given = vllm_config.additional_config
    vllm_config.additional_config = {**(given if isinstance(given, dict) else {}), NAMESPACE: section}


def chosen_block_sizes(vllm_config: VllmConfig, settings: Settings, given: int | None) -> BlockSizes:
    """Block sizes of both caches, the compressed one's where it is `given`; of the largest rank where ranks differ."""
    _, artifact = served_artifact(vllm_config)
    assert settings.recent_window
    cache, ranks = vllm_config.cache_config, vllm_config.parallel_config.tensor_parallel_size
    shards = [artifact.layer_shard(index, 0, ranks) for index in artifact.compressed_layers]
    dtype = kv_cache_dtype_str_to_dtype(cache.cache_dtype, vllm_config.model_config)
    raw_bytes = sum(2 * shard.num_kv_heads * shard.head_dim * dtype.itemsize for shard in shards)
    code_bytes = sum(shard.layout.token_bytes for shard in shards)
    multiple = GPU_BLOCK_MULTIPLE if settings.engine == "triton" else WINDOWED_BLOCK_MULTIPLE
    return block_sizes(code_bytes, raw_bytes, settings.recent_window, multiple, given)


def _refusals(vllm_config: VllmConfig, settings: Settings, artifact: Artifact) -> list[tuple[bool, str]]:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    model, speculation = vllm_config.model_config, vllm_config.speculative_config
    block_size = cache.block_size if cache.user_specified_block_size else BLOCK_MULTIPLE
    # That of the window's blocks once these are known.
    multiple = settings.window_block or BLOCK_MULTIPLE
    heads = model.get_total_num_kv_heads()
    ranks = parallel.tensor_parallel_size
    version = vllm_version()
    return [
        (
            not version.startswith(TESTED_VLLM) and not os.environ.get(UNTESTED_VARIABLE),
            f"vLLM {version} is untested, install {TESTED_VLLM[0]}x or set {UNTESTED_VARIABLE}=1",
        ),
        (
            speculation is not None and speculation.method not in DRAFTS_WITHOUT_CACHE,
            "speculative decoding with a draft model is not supported, use "
            "--speculative-config.method ngram or drop --speculative-config",
        ),
        (
            vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None,
            "KV connectors and offloading are not supported, drop --kv-transfer-config and --kv-offloading-size",
        ),
        (
            cache.cache_dtype not in ("auto", "bfloat16", "float16"),
            f"the artifact decides the cache's format, not --kv-cache-dtype or the checkpoint ({cache.cache_dtype}); "
            "use --kv-cache-dtype bfloat16",
        ),
        (
            parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1
            or parallel.pipeline_parallel_size > 1,
            "context and pipeline parallelism are not supported, use --tensor-parallel-size",
        ),
        (heads % ranks != 0 and ranks % heads != 0, f"{heads} KV heads cannot be spread over {ranks} ranks"),
        (block_size % multiple != 0, f"--block-size {block_size} is not a multiple of {multiple}"),
        (
            bool(vllm_config.attention_config.backend_per_kind),
            "some layers would stay uncompressed, drop --attention-config.backend_per_kind",
        ),
        (
            model.disable_sliding_window and not artifact.covers_all_layers,
            "sliding-window layers have no codec, drop --disable-sliding-window",
        ),
        (model.enable_sleep_mode, "sleeping is not supported, drop --enable-sleep-mode"),
        (model.attention_chunk_size is not None, "attention in local chunks is not supported"),
        (
            model.get_head_size() > LARGEST_HEAD and settings.engine != "reference",
            f"the {settings.engine} engine takes heads of up to {LARGEST_HEAD} dimensions, set engine to reference",
        ),
        (
            bool(settings.recent_window) and not artifact.covers_all_layers,
            "the exact window needs every layer compressed, and this model has sliding-window layers; "
            "set recent_window to 0",
        ),
        (
            bool(settings.recent_window) and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is True,
            "the exact window needs vLLM's hybrid KV cache manager, drop --disable-hybrid-kv-cache-manager",
        ),
        (
            settings.prefill == "exact" and not settings.recent_window,
            "prefill exact needs an exact window, set recent_window above 0",
        ),
        (model.use_mla, "multi-head latent attention models have no KV heads to compress"),
        (model.is_encoder_decoder, "encoder-decoder models are not supported"),
        (
            model.is_multimodal_model,
            "multimodal models are not supported, their positions are not those of the text",
        ),
    ]


def _wrap_config_check(platform: Any) -> None:
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        try:
            if vllm_config.model_config is not None and selected(vllm_config):
                prepare(vllm_config)
        except KVSpliceError:
            print_without_traceback()
            raise
        original(cls, vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)


def _wrap_backend_choice(platform: Any) -> None:
    original = platform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(cls: type, selected_backend: Any, attn_selector_config: Any, **options: Any) -> str:
        ours = selected_backend is AttentionBackendEnum.CUSTOM and selected_backend.get_path() == BACKEND_PATH
        if ours and attn_selector_config.has_sliding_window:
            logger.info_once("KVSplice leaves sliding-window layers to the stock attention backend.")
        elif ours and attn_selector_config.attn_type == AttentionType.DECODER:
            return BACKEND_PATH
        stock = None if ours else selected_backend
        return original(cls, selected_backend=stock, attn_selector_config=attn_selector_config, **options)

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)

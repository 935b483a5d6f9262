"""From a Hugging Face model to compressed generation in three lines, as in a notebook."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vllm_kvsplice.artifact import Artifact, save_artifact
from vllm_kvsplice.engines import DEFAULT_WINDOW
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.hub import from_pretrained
from vllm_kvsplice.huggingface.cache import KVSpliceCache


class CompressedKVModelWrapper:
    """A causal LM whose `generate` and `forward` keep a `KVSpliceCache` unless they are given a cache.

    Everything else is the model's own. Arguments as of `KVSpliceCache`.
    """

    model: Any

    def __init__(
        self,
        model: PreTrainedModel,
        artifact: Artifact | Path | str,
        recent_window: int = DEFAULT_WINDOW,
        prune_values: int | None = None,
        prune_first: bool = False,
    ) -> None:
        self.model = model
        self.artifact = from_pretrained(artifact)
        self._options: dict[str, Any] = {
            "recent_window": recent_window,
            "prune_values": prune_values,
            "prune_first": prune_first,
        }
        # A mistake in the arguments shows now and not in the middle of an answer.
        self.new_cache()

    def new_cache(self) -> KVSpliceCache:
        """An empty cache, to keep a conversation in: pass it to every `generate` as ``past_key_values``."""
        return KVSpliceCache(self.artifact, self.model.config, **self._options)

    def generate(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return self.model.generate(*args, past_key_values=self._cache(past_key_values), **kwargs)

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return self.model(*args, past_key_values=self._cache(past_key_values), **kwargs)

    __call__ = forward

    def _cache(self, given: Any) -> Any:
        return self.new_cache() if given is None else given

    def __getattr__(self, name: str) -> Any:
        # Until `model` is there, as while one is unpickled, there is nobody to ask.
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)


def calibrate_kv_compressor(
    model: PreTrainedModel | Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    out: Path | str | None = None,
    **recipe: Any,
) -> Artifact:
    """Fit a codec to a model, as ``kvsplice calibrate`` does.

    Args:
        model: in memory, where it stays as it is, or a directory or Hub name.
        tokenizer: the model's; by default the one its weights came with.
        out: directory to write the artifact to.
        recipe: `bits` (4 by default), `text`, `tokens` and whatever else `calibration.recipe.CalibrationConfig` takes.

    Raises:
        KVSpliceError: a mistake of the user's; the message names the way out.

    """
    from calibration.pipeline import make
    from calibration.recipe import read_config

    config = read_config(None, **recipe)
    if isinstance(model, Path | str):
        artifact = make(str(model), config)
    else:
        with _measurable(model):
            artifact = make((model, tokenizer or _tokenizer_of(model)), config)
    return save_artifact(artifact, Path(out)) if out is not None else artifact


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise KVSpliceError(
            f"{type(model).__name__} came without a tokenizer; pass it as the second argument"
        ) from error


@contextmanager
def _measurable(model: PreTrainedModel) -> Iterator[None]:
    """`model` without dropout and without gradients of its weights, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)

"""A cache of Hugging Face transformers that stores the codes of an artifact."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from vllm_kvsplice.artifact import Artifact
from vllm_kvsplice.engines import DEFAULT_WINDOW, MAX_WINDOW
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.hub import from_pretrained
from vllm_kvsplice.huggingface.attention import ATTENTION
from vllm_kvsplice.huggingface.layer import CompressedLayer, Warp, WarpedLayer
from vllm_kvsplice.huggingface.pruning import PrunedLayer


class KVSpliceCache(Cache):
    """For ``model.generate(..., past_key_values=cache)``: an artifact's layers packed, others as transformers keep them.

    A query at position i reads tokens j > i - `recent_window` as they are and all older ones as stored, as in the server
    (docs/window.md). What may be done with a `DynamicCache` may be done with this one.

    Args:
        artifact: directory, name on the Hub, or an artifact already loaded.
        config: the model's. Its attention becomes `kvsplice`, which with any other cache is `sdpa`.
        recent_window: W; 0 reads everything as stored.
        prune_values: k; each head keeps the values of the k older tokens that drew most attention, and reads the mean in
            place of the others (`vllm_kvsplice.huggingface.pruning`). None keeps all.
        prune_first: judge tokens of a step by their keys as they are (prune, then compress) and not as stored (compress,
            then select).
        value_warps: by layer, what values went through before the artifact was fitted to them
            (`calibration.compare.spline_first`). None: nothing.

    Raises:
        ArtifactError: there is no such artifact, it is damaged, or it belongs to another model.
        KVSpliceError: the model or an argument cannot be used.

    """

    def __init__(
        self,
        artifact: Artifact | Path | str,
        config: PreTrainedConfig,
        recent_window: int = DEFAULT_WINDOW,
        prune_values: int | None = None,
        prune_first: bool = False,
        value_warps: Mapping[int, Warp] | None = None,
    ) -> None:
        if not 0 <= recent_window <= MAX_WINDOW:
            raise KVSpliceError(f"recent_window {recent_window} is not between 0 and {MAX_WINDOW}")
        if prune_values is not None and prune_values < 1:
            raise KVSpliceError(f"prune_values {prune_values} would keep no value at all; give at least 1, or None")
        if prune_values is not None and value_warps is not None:
            raise KVSpliceError("prune_values and value_warps cannot be had together; leave one of them out")
        loaded = from_pretrained(artifact)
        loaded.check_model(config)
        config = config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        if len(layers) != config.num_hidden_layers:
            raise KVSpliceError("layers of this model share their cache, which KVSplice does not support")
        leader: CompressedLayer | None = None
        for index, codec in loaded.codecs.items():
            layer: CompressedLayer
            if prune_values is not None:
                layer = PrunedLayer(codec, recent_window, leader, prune_values, prune_first)
            elif value_warps is not None:
                layer = WarpedLayer(codec, recent_window, leader, value_warps[index])
            else:
                layer = CompressedLayer(codec, recent_window, leader)
            leader, layers[index] = leader or layer, layer
        config._attn_implementation = ATTENTION
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all tensors take which are held between steps, in dense layers as well."""
        tensors = [held for layer in self.layers for held in vars(layer).values() if isinstance(held, Tensor)]
        storages = {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in tensors}
        return sum(storages.values())

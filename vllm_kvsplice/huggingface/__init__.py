"""Compressed caches in Hugging Face transformers, without vLLM: docs/huggingface.md.

Importing this package also registers the attention function `kvsplice` with transformers.
"""

from vllm_kvsplice.hub import from_pretrained, push_to_hub
from vllm_kvsplice.huggingface.cache import KVSpliceCache
from vllm_kvsplice.huggingface.model import CompressedKVModelWrapper, calibrate_kv_compressor
from vllm_kvsplice.huggingface.pruning import value_elements

__all__ = [
    "CompressedKVModelWrapper",
    "KVSpliceCache",
    "calibrate_kv_compressor",
    "from_pretrained",
    "push_to_hub",
    "value_elements",
]

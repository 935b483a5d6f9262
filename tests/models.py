"""Tiny random Hugging Face models with a tokenizer, made offline in a fraction of a second; vLLM serves them as well."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

VOCAB = 512
POSITIONS = 512
# Natural text for tokenizers and calibration: a part of the language reference that every CPython carries.
TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:60_000]
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    # Wide enough that attention is far from uniform, so that an error in the cache shows in the logits.
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


# Stands for a setting that an architecture does not know.
OMITTED = object()


class Family(NamedTuple):
    """An architecture: its configuration class, its own settings, and what calibration must find out about it.

    `pairs` of dimensions are rotated (0: none), `interleaved` or not, but in layers `unrotated`; layers in `sliding` keep
    their dense cache.
    """

    config: str
    settings: dict[str, Any]
    pairs: int = 16
    interleaved: bool = False
    sliding: tuple[int, ...] = ()
    unrotated: tuple[int, ...] = ()


FAMILIES = {
    "llama": Family("LlamaConfig", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2": Family("Qwen2Config", {}),
    "qwen3": Family("Qwen3Config", {"head_dim": 32}),
    "mistral": Family("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "gpt2": Family("GPT2Config", {"num_key_value_heads": OMITTED, "n_inner": 192}, pairs=0),
    "stablelm": Family("StableLmConfig", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}, pairs=4),
    "phi": Family("PhiConfig", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}, pairs=8),
    "gemma": Family("GemmaConfig", {"head_dim": 32}),
    "glm4": Family("Glm4Config", {"head_dim": 32, "partial_rotary_factor": 0.5}, pairs=8, interleaved=True),
    "gemma3": Family(
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        sliding=(0,),
    ),
    "smollm3": Family("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}, unrotated=(1,)),
    "cohere2": Family(
        "Cohere2Config",
        {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        pairs=0,
        sliding=(0,),
    ),
}


def tiny_model(family: str, directory: Path, **overrides: Any) -> Path:
    """Write a model of one of `FAMILIES`, the same weights every time, and its tokenizer; returns `directory`.

    `overrides` replace settings of the Hugging Face configuration, such as ``rope_parameters``.
    """
    made = FAMILIES[family]
    settings = {name: value for name, value in (_SIZES | made.settings | overrides).items() if value is not OMITTED}
    config: PreTrainedConfig = getattr(transformers, made.config)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # Biases start at zero; in real models they give keys and values the large means that the codec removes.
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens with a chat template; decodes to the text it was given."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe()),
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def _byte_level_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()

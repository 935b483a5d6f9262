"""Text to calibrate and evaluate on, as windows of tokens."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from vllm_kvsplice.errors import KVSpliceError

NAMED = ("pydoc", "wikitext")
_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
# One window in so many is set as a conversation.
CHAT_EVERY = 4
# Of the tokens to fit to, those that the model says by itself: beside text like that to be served, and beside text of no
# domain in particular (DECISIONS.md).
OWN_SHARE, OWN_SHARE_ANYWHERE = 1 / 2, 3 / 4
# Tokens that a model says in one go: shorter pieces are of more kinds, still shorter ones hardly text (DECISIONS.md).
PIECE = 128
# Pieces at once: more would need more memory and be hardly faster.
_PIECES_AT_ONCE = 128
# Enough characters for any window: natural text has 3 to 6 per token.
_CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True)
class Corpus:
    """Text for fitting and text that fitting never sees, and where both come from.

    Attributes:
        name: of the text.
        fit, held_out: the text.
        own_share: of the tokens to fit to, those that the model says by itself.

    """

    name: str
    fit: str
    held_out: str
    own_share: float = OWN_SHARE

    def own(self, count: int) -> int:
        """How many of `count` windows the model says by itself."""
        return int(count * self.own_share)

    @property
    def sha256(self) -> str:
        return hashlib.sha256((self.fit + self.held_out).encode()).hexdigest()


def load_corpus(source: str) -> Corpus:
    """Text by name, from a file or from a directory.

    `pydoc` is the language reference that every CPython carries, half to fit and half held out; `wikitext` is WikiText-2
    from the Hugging Face Hub; of files, the last tenth is held out.

    Raises:
        KVSpliceError: there is no such text, or it cannot be read.

    """
    if source == "pydoc":
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics))
        return Corpus(source, text[: len(text) // 2], text[len(text) // 2 :], OWN_SHARE_ANYWHERE)
    if source == "wikitext":
        return Corpus(source, _wikitext("train"), _wikitext("validation"))
    text = read_text(source)
    cut = len(text) * 9 // 10
    return Corpus(Path(source).resolve().name, text[:cut], text[cut:])


def read_text(source: str) -> str:
    """All of a file, or of a directory's text files in the order of their names; the held-out part of a named text."""
    if source in NAMED:
        return load_corpus(source).held_out
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in _SUFFIXES and f.is_file())
        if not files:
            raise KVSpliceError(f"{path} holds no text file ({', '.join(_SUFFIXES)})")
        return "\n".join(map(_read_file, files))
    if not path.is_file():
        raise KVSpliceError(f"there is no text {source!r}; give a file, a directory, or one of: {', '.join(NAMED)}")
    return _read_file(path)


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return text
        text = "\n".join(json.loads(line)["text"] for line in text.split("\n") if line.strip())
        # Halves of characters, which JSON may hold and no tokenizer takes.
        return text.encode(errors="replace").decode()
    except UnicodeDecodeError as error:
        raise KVSpliceError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise KVSpliceError(f'{path} is not JSON lines with a "text" in each ({error})') from error


def _wikitext(split: str) -> str:
    from datasets import load_dataset

    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    # Whatever is between here and the Hub may fail in its own way; for the user all of it means one thing.
    except Exception as error:
        raise KVSpliceError(
            f"WikiText cannot be fetched from the Hugging Face Hub ({type(error).__name__}); "
            "use --text pydoc, or a text file of your own"
        ) from error
    return "".join(rows["text"])


def token_windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int, context: int) -> Tensor:
    """Up to `count` windows of exactly `context` tokens, spread evenly over `text`: int64 [W, context].

    Raises:
        KVSpliceError: the text is shorter than one window.

    """
    share = context * _CHARACTERS_PER_TOKEN
    if len(text) > count * share:
        starts = [i * (len(text) // count) for i in range(count)]
        pieces = [_tokens(tokenizer, text[start : start + share]) for start in starts]
        windows = [piece[:context] for piece in pieces if len(piece) >= context]
        if len(windows) == count:
            return torch.stack(windows)
    tokens = _tokens(tokenizer, text)
    whole = len(tokens) // context
    if not whole:
        raise KVSpliceError(
            f"the text has {len(tokens)} tokens, fewer than one window of {context}; give more text or a lower --context"
        )
    chosen = torch.arange(min(count, whole)) * whole // min(count, whole)
    return tokens[: whole * context].view(whole, context)[chosen]


def calibration_windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int, context: int) -> Tensor:
    """Windows as `token_windows` makes them, every fourth one set as a conversation if the model knows how.

    The special tokens of a conversation have keys and values unlike any in running text; a codec that never saw them
    clips them.
    """
    windows = token_windows(tokenizer, text, count, context)
    if tokenizer.chat_template is None:
        return windows
    for index in range(CHAT_EVERY - 1, len(windows), CHAT_EVERY):
        try:
            conversation = _as_conversation(tokenizer, str(tokenizer.decode(windows[index])), context)
        # Some templates refuse what they do not know.
        except TemplateError:
            return windows
        # Text of little but white space shrinks below a window: leave that window as it is.
        if len(conversation) == context:
            windows[index] = conversation
    return windows


def own_text(model: PreTrainedModel, count: int, context: int, seed: int) -> Tensor:
    """What `model` says by itself, each piece from a random token on: int64 [count, context].

    Text of every kind that the model knows, so that a codec fitted to one kind of text serves others as well (Liu et al.,
    LLM-QAT, arXiv:2305.17888).

    Raises:
        KVSpliceError: the model computes nonsense, or there is no memory for it.

    """
    pieces = math.ceil(context / PIECE)
    length = math.ceil(context / pieces)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(model.config.get_text_config().vocab_size, (count * pieces, 1), generator=generator)
    draw = LogitsProcessorList([_Draw(generator)])
    try:
        said = [_continued(model, some, length, draw) for some in first.split(_PIECES_AT_ONCE)]
    except RuntimeError as error:
        raise KVSpliceError(
            f"the model cannot say anything ({error}); if its probabilities are not finite, its weights are damaged"
        ) from error
    return torch.cat(said).view(count, pieces * length)[:, :context]


class _Draw(LogitsProcessor):
    """Leaves one token in each row, drawn by its probability; torch itself draws a random number for every word."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        reached = scores.float().softmax(-1).cumsum(-1)
        if not reached[:, -1].isfinite().all():
            raise RuntimeError("probabilities are not numbers")
        place = torch.rand(len(scores), 1, generator=self._generator).to(reached.device) * reached[:, -1:]
        drawn = torch.searchsorted(reached, place, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0)


def _continued(model: PreTrainedModel, first: Tensor, length: int, draw: LogitsProcessorList) -> Tensor:
    """`first` tokens [P, 1] and what the model says after each, [P, length], chosen by `draw` alone."""
    # Type checkers find a tensor where transformers mixes this method in.
    said: Tensor = model.generate(  # type: ignore[operator]
        first.to(model.device),
        attention_mask=torch.ones_like(first).to(model.device),
        logits_processor=draw,
        do_sample=False,
        # Nothing of the model's own habits of generation.
        num_beams=1,
        temperature=None,
        top_k=None,
        top_p=None,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        return_dict_in_generate=False,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
        pad_token_id=0,
    )
    return said.cpu()


def _as_conversation(tokenizer: PreTrainedTokenizerBase, text: str, context: int) -> Tensor:
    """The first `context` tokens of `text` as turns of a user and an assistant, question and answer of unequal length."""
    turns: list[dict[str, str]] = []
    start = 0
    while start < len(text):
        role, length = ("user", 120) if len(turns) % 2 == 0 else ("assistant", 480)
        turns.append({"role": role, "content": text[start : start + length].strip() or "..."})
        start += length
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    return _tokens(tokenizer, str(rendered))[:context]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    return ids.long()

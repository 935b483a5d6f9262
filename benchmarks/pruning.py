"""What value pruning costs and gains in the Hugging Face path, for `docs/huggingface.md`.

    python -m benchmarks.pruning ARTIFACT --text HELD_OUT_TEXT

Of each window of text the first 1024 tokens are a prompt, after which every head keeps the values of k of them, and the 256
that follow are judged: perplexity, and KL divergence from the uncompressed model. On the default model, in float32. Rows go
to build/bench/pruning.json.
"""

import argparse
import copy
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from calibration.models import default_model, load_model
from calibration.progress import steps
from calibration.text import read_text, token_windows
from vllm_kvsplice.artifact import Artifact, load_artifact
from vllm_kvsplice.huggingface import KVSpliceCache

PROMPT, JUDGED = 1024, 256
KEPT = (512, 391, 256, 128)
ORDERS = {False: "compress, select", True: "prune, compress"}
RESULT = Path("build/bench/pruning.json")

console = Console()


class Case(NamedTuple):
    """Who chooses how many values; `kept` is None for all, `order` is "" where nothing is chosen."""

    order: str
    kept: int | None


class Figures(NamedTuple):
    """Sums over judged tokens in nats, and bytes held after the prompt."""

    loss: float
    divergence: float
    held: int


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", help="of the default model")
    parser.add_argument("--text", required=True, help="as for kvsplice eval")
    parser.add_argument("--windows", type=int, default=2, help="of text")
    options = parser.parse_args()
    path = str(default_model())
    model, _ = load_model(path, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows = token_windows(tokenizer, read_text(options.text), options.windows, PROMPT + JUDGED)
    found: dict[Case, list[Figures]] = defaultdict(list)
    with steps("Pruning values", len(windows)) as progress:
        for window in windows:
            for case, figures in measured(model, load_artifact(options.artifact), window[None]):
                found[case].append(figures)
            progress()
    rows = [row(case, figures, found[Case("uncompressed", None)]) for case, figures in found.items()]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    print_rows(rows)
    console.print(f"Wrote {RESULT}")


@torch.no_grad()
def measured(model: PreTrainedModel, artifact: Artifact, window: Tensor) -> Iterator[tuple[Case, Figures]]:
    """Every case on token ids [1, PROMPT + JUDGED]."""
    prompt, rest = window.split([PROMPT, JUDGED], 1)
    dense = DynamicCache(config=model.config)
    last = after_prompt(model, dense, prompt)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    exact = continued(model, dense, last, rest)
    yield Case("uncompressed", None), judge(exact, exact, rest, held)
    cache = KVSpliceCache(artifact, model.config)
    last, held = after_prompt(model, cache, prompt), cache.nbytes
    yield Case("compressed", None), judge(continued(model, cache, last, rest), exact, rest, held)
    for first, order in ORDERS.items():
        cache = KVSpliceCache(artifact, model.config, prune_values=PROMPT, prune_first=first)
        last = after_prompt(model, cache, prompt)
        for kept in KEPT:
            pruned = prune(cache, kept)
            held = pruned.nbytes
            yield Case(order, kept), judge(continued(model, pruned, last, rest), exact, rest, held)


def after_prompt(model: PreTrainedModel, cache: Any, prompt: Tensor) -> Tensor:
    """Read a prompt into `cache`; returns its last logits [1, 1, V]."""
    return model(prompt, past_key_values=cache, logits_to_keep=1).logits


def prune(cache: KVSpliceCache, kept: int) -> KVSpliceCache:
    """A copy of `cache` after the prompt, as if it had been made to keep `kept` values."""
    pruned = copy.deepcopy(cache)
    for layer in pruned.layers:
        layer.k = kept
        layer.trim()
    return pruned


def continued(model: PreTrainedModel, cache: Any, last: Tensor, rest: Tensor) -> Tensor:
    """Log-probabilities [JUDGED, V] of the tokens after the prompt, whose last logits are `last`."""
    logits = model(rest, past_key_values=cache).logits
    return torch.cat((last, logits[:, :-1]), 1)[0].log_softmax(-1)


def judge(given: Tensor, exact: Tensor, rest: Tensor, held: int) -> Figures:
    loss = -given.gather(1, rest[0, :, None]).sum()
    return Figures(float(loss), float((exact.exp() * (exact - given)).sum()), held)


def row(case: Case, figures: list[Figures], exact: list[Figures]) -> dict[str, Any]:
    tokens = JUDGED * len(figures)
    ppl, baseline = (math.exp(sum(f.loss for f in of) / tokens) for of in (figures, exact))
    return {
        "method": case.order,
        "kept": case.kept,
        "ppl": ppl,
        "change_percent": 100 * (ppl / baseline - 1),
        "kl": sum(f.divergence for f in figures) / tokens,
        "bytes_per_token": figures[0].held / PROMPT,
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table("method", "values kept", "perplexity", "change", "KL", "bytes per token")
    for r in rows:
        figures = f"{r['ppl']:.3f}", f"{r['change_percent']:+.2f} %", f"{r['kl']:.4f}", f"{r['bytes_per_token']:.0f}"
        table.add_row(r["method"], "all" if r["kept"] is None else str(r["kept"]), *figures)
    console.print(table)


if __name__ == "__main__":
    main()

"""What an exact window buys and costs, for `docs/window.md`: perplexity by window and bits, and memory by window.

    python -m benchmarks.window --text HELD_OUT_TEXT ARTIFACT...

Perplexity is measured on the default model as `kvsplice eval --recent W` does (mode `all`); memory is what vLLM's blocks
take, by the same functions that a server uses. Rows go to build/bench/window.json.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.server import STOCK_BLOCK
from calibration.attention import Reading
from calibration.evaluate import compressing_tap, evaluate
from calibration.models import default_model, load_model
from calibration.progress import steps
from calibration.text import read_text, token_windows
from vllm_kvsplice.artifact import Artifact, load_artifact
from vllm_kvsplice.engines import DEFAULT_WINDOW
from vllm_kvsplice.serving.plugin import WINDOWED_BLOCK_MULTIPLE
from vllm_kvsplice.serving.window_blocks import block_sizes

WINDOWS = (0, 8, 16, 32, 64, 128)
CONTEXT = 1024
CONTEXTS = (1024, 4096, 16384)
SEQUENCES = (1, 8, 64)
RESULT = Path("build/bench/window.json")

console = Console()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="+", help="of the default model")
    parser.add_argument("--text", required=True, help="as for kvsplice eval")
    parser.add_argument("--windows", type=int, default=12, help="of text")
    options = parser.parse_args()
    artifacts = [load_artifact(path) for path in options.artifacts]
    rows = [*quality_rows(artifacts, options.text, options.windows), *memory_rows(artifacts)]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(f"Wrote {RESULT}")


def quality_rows(artifacts: list[Artifact], text: str, count: int) -> list[dict[str, float | str]]:
    """Change of perplexity in percent, by bits and window, and by how the prompt was read."""
    path = str(default_model())
    model, _ = load_model(path, torch.float32)
    tokens = token_windows(AutoTokenizer.from_pretrained(path), read_text(text), count, CONTEXT)
    table = Table("bits", *map(str, WINDOWS), title="Change of perplexity by exact window, %", title_justify="left")
    title = "The same with a window of 32, on the second half of each text after its first half as a prompt, %"
    second_halves = Table("bits", "prefill", "change", title=title, title_justify="left")
    rows: list[dict[str, float | str]] = []
    for artifact in artifacts:
        artifact.check_model(model.config)
        tap = compressing_tap(artifact.codecs, "all")
        changes = []
        for window in WINDOWS:
            with steps(f"{artifact.bits_per_element:.2f} bits, window {window}", count) as progress:
                result = evaluate(model, tap, tokens, progress, Reading(window))
            changes.append(result.change_percent)
            rows.append({"bits": artifact.bits_per_element, "window": window, "change_percent": changes[-1]})
        bits = f"{artifact.bits_per_element:.2f}"
        table.add_row(bits, *(f"{change:+.2f}" for change in changes))
        for prefill, prompt in (("stored", 0), ("exact", CONTEXT // 2)):
            with steps(f"{bits} bits, prefill {prefill}", count) as progress:
                result = evaluate(model, tap, tokens, progress, Reading(DEFAULT_WINDOW, prompt), CONTEXT // 2)
            rows.append(
                {"bits": artifact.bits_per_element, "prefill": prefill, "change_percent": result.change_percent}
            )
            second_halves.add_row(bits, prefill, f"{result.change_percent:+.2f}")
    console.print(table)
    console.print(second_halves)
    return rows


def memory_rows(artifacts: list[Artifact]) -> list[dict[str, float]]:
    """How many times the tokens of stock vLLM fit the same memory, by bits, window, context and sequences."""
    rows = []
    cases = [(context, sequences) for context in CONTEXTS for sequences in SEQUENCES]
    for artifact in artifacts:
        title = f"Tokens in the same memory, times stock, {artifact.bits_per_element:.2f} bits"
        table = Table("window", *(f"{n} x {c // 1024}k" for c, n in cases), title=title, title_justify="left")
        for window in WINDOWS:
            ratios = []
            for context, sequences in cases:
                stock = sequences * -(-context // STOCK_BLOCK) * STOCK_BLOCK * artifact.baseline_bytes_per_token
                ratios.append(stock / memory_bytes(artifact, window, context, sequences))
                rows.append(
                    {
                        "bits": artifact.bits_per_element,
                        "window": window,
                        "context": context,
                        "sequences": sequences,
                        "times_stock": ratios[-1],
                    }
                )
            table.add_row(str(window), *(f"{ratio:.2f}" for ratio in ratios))
        console.print(table)
    return rows


def memory_bytes(artifact: Artifact, window: int, context: int, sequences: int) -> int:
    """Bytes of all blocks that `sequences` of `context` tokens hold while one of them is in a step of prefill."""
    if not window:
        return sequences * -(-context // STOCK_BLOCK) * STOCK_BLOCK * artifact.bytes_per_token
    compressed, dense = artifact.bytes_per_token, artifact.baseline_bytes_per_token
    sizes = block_sizes(compressed, dense, window, WINDOWED_BLOCK_MULTIPLE, None)
    return sizes.pool_blocks(sequences, context, window) * sizes.block_bytes


if __name__ == "__main__":
    main()

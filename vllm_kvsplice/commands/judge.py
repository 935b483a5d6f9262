"""`kvsplice eval`: what an artifact costs on text."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table

from vllm_kvsplice.commands.options import ArtifactDir, Context, Model, output_file
from vllm_kvsplice.commands.printing import console
from vllm_kvsplice.errors import KVSpliceError


class Mode(StrEnum):
    """How ``kvsplice eval`` reads position 0."""

    all = "all"
    serving = "serving"


def evaluate(
    model: Model,
    artifact: ArtifactDir,
    text: Annotated[str, typer.Option(help="A file, a directory, pydoc or wikitext (their held-out parts).")],
    context: Context = None,
    windows: Annotated[int, typer.Option(help="Windows, spread evenly over the text.", min=1)] = 12,
    mode: Annotated[
        Mode, typer.Option(help="all: position 0 exact. serving: exactly what the server reads.")
    ] = Mode.all,
    recent: Annotated[
        int, typer.Option(help="Exact window: a query reads this many newest tokens as they are.", min=0)
    ] = 0,
    exact_prompt: Annotated[
        int, typer.Option(help="Read this many first tokens exactly among themselves; judge what follows.", min=0)
    ] = 0,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="Write the figures here as well.", callback=output_file)
    ] = None,
) -> None:
    """Perplexity of a model without and with its cache compressed (every attended key and value read as stored).

    A server reads the newest tokens exactly (`recent_window`, 32 by default): `--recent 32` measures what it serves.
    `--exact-prompt` does so for a server with `"prefill": "exact"`.

    Example: `kvsplice eval $(kvsplice model) smollm2-4bit --text pydoc --windows 12 --recent 32`
    """
    import torch

    from calibration.attention import Reading
    from calibration.models import load_model, window_length
    from calibration.pipeline import judge
    from calibration.text import read_text, token_windows
    from vllm_kvsplice.hub import from_pretrained

    loaded = from_pretrained(artifact, model)
    content = read_text(text)
    in_memory = load_model(model, torch.float32)
    length = window_length(in_memory[0], context)
    if exact_prompt >= length:
        raise KVSpliceError(f"--exact-prompt {exact_prompt} leaves nothing to judge of windows of {length} tokens")
    tokens = token_windows(in_memory[1], content, windows, length)
    reading = Reading(recent, exact_prompt)
    result = judge(in_memory, loaded, tokens, mode.value, "Measuring perplexity", reading)
    figures = {
        "baseline_ppl": result.baseline_ppl,
        "ppl": result.ppl,
        "change_percent": result.change_percent,
        "divergence": result.divergence,
        "bits_per_element": loaded.bits_per_element,
        "bytes_per_token": loaded.bytes_per_token,
        "baseline_bytes_per_token": loaded.baseline_bytes_per_token,
        "tokens": result.tokens,
        "mode": mode.value,
        "context": length,
        "recent_window": recent,
        "exact_prompt": exact_prompt,
    }
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    table = Table("", "uncompressed", "KVSplice", "change")
    table.add_row("perplexity", f"{result.baseline_ppl:.3f}", f"{result.ppl:.3f}", f"{result.change_percent:+.2f} %")
    table.add_row("divergence, nats per token", "", f"{result.divergence:.4f}", "")
    before, after = loaded.baseline_bytes_per_token, loaded.bytes_per_token
    table.add_row("bytes per token", f"{before}", f"{after}", f"{before / after:.2f}x smaller")
    table.add_row("bits per element", "16", f"{loaded.bits_per_element:.2f}", "")
    console.print(table)

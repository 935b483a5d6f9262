"""Arguments and options that several commands have."""

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.names import FitName, PlannerName


def output_file(path: Path | None) -> Path | None:
    """A file that will be written: refused before any work where it cannot be, which a directory never is."""
    if path and path.is_dir():
        raise KVSpliceError(f"{path} is a directory; name a file in it")
    return output(path)


def output(path: Path | None) -> Path | None:
    """A file or directory that will be written, refused before any work where nothing can be made."""
    if path:
        above = next(p for p in path.absolute().parents if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise KVSpliceError(
                f"cannot write {path}: {above} is no directory that can be written to; name another place"
            )
    return path


Model = Annotated[str, typer.Argument(help="Model directory, or name on the Hugging Face Hub.", metavar="MODEL")]
ArtifactDir = Annotated[str, typer.Argument(help="Artifact directory, or name on the Hub.", metavar="ARTIFACT")]

# Of recipes. Without a default here, because a recipe's file may set them.
Text = Annotated[Optional[str], typer.Option(help="pydoc, wikitext, a file or a directory.  [default: pydoc]")]
Tokens = Annotated[Optional[int], typer.Option(help="Tokens to measure on.  [default: 16384]")]
Bits = Annotated[
    Optional[float], typer.Option(help="Bits per element of the layers that are compressed, 1.5 to 8.  [default: 4.0]")
]
Budget = Annotated[Optional[int], typer.Option(help="Bytes per token over all layers, instead of --bits.")]
MaxIncrease = Annotated[
    Optional[str],
    typer.Option(
        "--max-ppl-increase", help="As in 1%: the smallest size that keeps to it on held-out text, instead of --bits."
    ),
]
Plans = Annotated[
    Optional[PlannerName],
    typer.Option(help="Who decides on bits.  [default: budget; manual with --plan]", show_default=False),
]
Fits = Annotated[
    Optional[FitName], typer.Option(help="How transforms and codebooks are fitted.  [default: pca]", show_default=False)
]
Finetune = Annotated[
    Optional[bool],
    typer.Option(
        "--finetune",
        help="Then train until the model says what it says uncompressed: minutes.",
    ),
]
Steps = Annotated[Optional[int], typer.Option(help="Of --finetune.  [default: 300]")]
Errors = Annotated[
    Optional[Path],
    typer.Option(help="Write every head's errors before and after training here, as CSV.", callback=output_file),
]
PlanJson = Annotated[
    Optional[Path], typer.Option("--plan", help="A plan of kvsplice plan, or one written by hand (configs/README.md).")
]
Fim = Annotated[Optional[Path], typer.Option(help="FIM metrics for --planner tiers, instead of measuring them.")]
Recipe = Annotated[Optional[Path], typer.Option(help="A recipe like those in configs/; options override it.")]
Context = Annotated[
    Optional[int], typer.Option(help="Tokens per window of text.  [default: 1024, or what the model reads]", min=16)
]
Recent = Annotated[
    Optional[int],
    typer.Option(
        help="Exact window that the codec will be read beside, as served by default: 32.  [default: 0, none]", min=0
    ),
]
Seed = Annotated[Optional[int], typer.Option(help="Seed of all sampling.  [default: 0]")]
Statistics = Annotated[
    Optional[Path],
    typer.Option(
        help="Keep the measurements in this file, and use them again if they still fit.", callback=output_file
    ),
]

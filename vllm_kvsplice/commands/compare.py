"""`kvsplice compare`: other ways to store a cache and ours, in one harness."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.table import Column, Table

from vllm_kvsplice.commands import options
from vllm_kvsplice.commands.printing import console

if TYPE_CHECKING:
    from calibration.compare.harness import Row


def compare(
    model: options.Model,
    text: Annotated[str, typer.Option(help="Judge on this: a file, a directory, pydoc or wikitext.")],
    fit_text: Annotated[
        Optional[str],
        typer.Option(help="Fit our codecs, 2 to 8 bits, on this.  [default: pydoc; nothing with --artifact]"),
    ] = None,
    artifact: Annotated[
        Optional[list[str]], typer.Option(help="Judge this artifact as well; may be given several times.")
    ] = None,
    only: Annotated[str, typer.Option(help="Judge only methods with this in their name, such as KIVI.")] = "",
    windows: Annotated[int, typer.Option(help="Windows, spread evenly over the text.", min=1)] = 12,
    context: options.Context = None,
    recent: Annotated[int, typer.Option(help="Exact window of every method that has none of its own.", min=0)] = 0,
    tokens: options.Tokens = None,
    statistics: options.Statistics = None,
    json_file: Annotated[
        Optional[Path],
        typer.Option("--json", help="Write the rows here, after each one.", callback=options.output_file),
    ] = None,
    csv_file: Annotated[
        Optional[Path], typer.Option("--csv", help="Write the rows here, after each one.", callback=options.output_file)
    ] = None,
    plot: Annotated[
        Optional[Path],
        typer.Option(
            help="Draw rate and quality: FILE.png, FILE.html, or a directory for both.",
            callback=options.output,
        ),
    ] = None,
) -> None:
    """Perplexity and honest bits of other ways to store a cache, beside ours (docs/comparison.md says how each is read).

    Every attended key and value is read as stored, position 0 exactly, under every method.

    Examples:

    `kvsplice compare $(kvsplice model) --text judge.txt --fit-text fit.txt --csv comparison.csv --plot comparison.png`

    `kvsplice compare ./my-model --text judge.txt --artifact ./my-model/kvsplice --recent 32`
    """
    from calibration.compare.plots import check_plot, save_plots, save_rows
    from calibration.compare.run import Settings, run
    from calibration.recipe import read_config
    from vllm_kvsplice.hub import locate_artifact

    if plot:
        check_plot(plot)
    artifacts = [locate_artifact(given, model) for given in artifact or ()]
    fit = None if artifact and not fit_text else read_config(None, text=fit_text, tokens=tokens)
    rows: list[Row] = []
    for row in run(Settings(model, text, fit, artifacts, windows, context, recent, statistics, only)):
        rows.append(row)
        save_rows(rows, json_file, csv_file)
    _print(rows)
    for written in save_plots(rows, plot) if plot else ():
        console.print(f"Wrote {written}")


def _print(rows: "Sequence[Row]") -> None:
    """All methods by size, then where each of ours stands."""
    from calibration.compare.harness import better_peer

    table = Table(Column("method", no_wrap=True), "bits", "perplexity", "change")
    for row in sorted(rows, key=lambda row: row.bits_per_element):
        change = f"{row.change_percent:+.2f} ± {row.standard_error_percent:.2f} %"
        table.add_row(row.method, f"{row.bits_per_element:.3f}", f"{row.ppl:.3f}", change)
    console.print(table)
    console.print(f"uncompressed: {rows[0].baseline_ppl:.3f} on {rows[0].tokens} tokens")
    for row in rows:
        if row.ours:
            peer = better_peer(row, rows)
            needs = f"{peer.bits_per_element:.2f} bits ({peer.method})" if peer else "more than any peer here has"
            console.print(f"{row.method}: a peer as good takes {needs}", soft_wrap=True)

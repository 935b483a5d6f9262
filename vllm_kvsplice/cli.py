"""The command line `kvsplice`. Commands import what they need when they run, so that `--help` answers at once."""

import sys
from typing import Annotated, NoReturn

import typer

from vllm_kvsplice import __version__
from vllm_kvsplice.commands import analysis, artifacts, judge, recipes, serve
from vllm_kvsplice.commands.compare import compare
from vllm_kvsplice.errors import KVSpliceError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Compress the KV cache of vLLM: calibrate a model once, then serve it with 4-5x more tokens in the same memory.",
    epilog="Start with: `kvsplice calibrate MODEL --out MODEL/kvsplice`, then `kvsplice serve MODEL MODEL/kvsplice`.",
)


app.command()(recipes.calibrate)
app.command()(recipes.plan)
app.command("eval")(judge.evaluate)
app.command()(compare)
app.command()(artifacts.inspect)
app.command()(artifacts.push)
app.command()(analysis.fim)
app.command()(analysis.report)
app.command()(serve.doctor)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)


@app.command()
def model() -> None:
    """Print the directory of the default model, SmolLM2-135M-Instruct, and prepare it on first use.

    Example: `kvsplice calibrate $(kvsplice model) --out smollm2-4bit`
    """
    from calibration.models import default_model

    print(default_model())


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def main() -> NoReturn:
    """Run the command line; mistakes of the user end in one sentence and exit status 1."""
    try:
        app()
    except KVSpliceError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"kvsplice: {message}", file=sys.stderr)
    sys.exit(1)

"""The command line `kvsplice`. Commands import what they need when they run, so that `--help` answers at once."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.table import Table
from rich.text import Text

from vllm_kvsplice import __version__
from vllm_kvsplice.commands import analysis, recipes
from vllm_kvsplice.commands.compare import compare
from vllm_kvsplice.commands.options import ArtifactDir, Context, Model, output_file
from vllm_kvsplice.commands.printing import console, print_summary, print_width_map
from vllm_kvsplice.errors import KVSpliceError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Compress the KV cache of vLLM: calibrate a model once, then serve it with 4-5x more tokens in the same memory.",
    epilog="Start with: `kvsplice calibrate MODEL --out MODEL/kvsplice`, then `kvsplice serve MODEL MODEL/kvsplice`.",
)


class Mode(StrEnum):
    """How ``kvsplice eval`` reads position 0."""

    all = "all"
    serving = "serving"


app.command()(recipes.calibrate)
app.command()(recipes.plan)
app.command()(compare)
app.command()(analysis.fim)
app.command()(analysis.report)


@app.command()
def model() -> None:
    """Print the directory of the default model, SmolLM2-135M-Instruct, and prepare it on first use.

    Example: `kvsplice calibrate $(kvsplice model) --out smollm2-4bit`
    """
    from calibration.models import default_model

    print(default_model())


@app.command("eval")
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


@app.command()
def inspect(artifact: ArtifactDir) -> None:
    """Show what an artifact holds: the width of every layer and head, bytes, and where it comes from.

    Example: `kvsplice inspect smollm2-4bit`
    """
    from vllm_kvsplice.hub import from_pretrained

    loaded = from_pretrained(artifact)
    print_width_map(loaded)
    print_summary(loaded, str(artifact))


@app.command()
def push(
    artifact: ArtifactDir,
    repository: Annotated[str, typer.Argument(help="Name on the Hub, OWNER/NAME.", metavar="REPO_ID")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if there is none.")] = False,
) -> None:
    """Upload an artifact to the Hugging Face Hub, with a model card of what it is, costs and comes from.

    Example: `kvsplice push smollm2-4bit someone/smollm2-kvsplice-4bit`
    """
    from vllm_kvsplice.hub import push_to_hub

    print(push_to_hub(artifact, repository, private))


@app.command()
def doctor(
    model: Annotated[Optional[str], typer.Argument(help="Model directory or Hub name.", metavar="[MODEL]")] = None,
    artifact: Annotated[
        Optional[str], typer.Argument(help="Artifact, if not in the model.", metavar="[ARTIFACT]")
    ] = None,
) -> None:
    """Check an installation, one line per requirement with its remedy; with MODEL, also that its artifact fits.

    Example: `kvsplice doctor $(kvsplice model) smollm2-4bit`
    """
    from vllm_kvsplice.doctor import examine

    healthy = True
    for check in examine(model, artifact):
        healthy &= check.passed
        mark = Text("ok  ", "green") if check.passed else Text("FAIL", "red")
        console.print(mark, check.name, "-", check.detail, soft_wrap=True, highlight=False, markup=False)
    raise typer.Exit(0 if healthy else 1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Model,
    artifact: Annotated[
        Optional[str], typer.Argument(help="Artifact.  [default: MODEL/kvsplice]", metavar="ARTIFACT")
    ] = None,
) -> None:
    """Run `vllm serve` with the compressed cache; every further option goes to vLLM.

    Example: `kvsplice serve $(kvsplice model) smollm2-4bit --port 8000 --max-model-len 8192`
    """
    from vllm_kvsplice.artifact import load_artifact
    from vllm_kvsplice.doctor import check_command_line, check_plugin
    from vllm_kvsplice.hub import locate_artifact

    extra = list(context.args)
    if model.startswith("-"):
        raise KVSpliceError(f"give MODEL before options such as {model}")
    if artifact is not None and artifact.startswith("-"):
        extra, artifact = [artifact, *extra], None
    options, extra = _merged_config(extra)
    section = options["kvsplice"]
    if artifact is not None and section.get("artifact", artifact) != artifact:
        raise KVSpliceError(
            f"ARTIFACT is {artifact} and --additional-config says {section['artifact']}; give one of them"
        )
    directory = locate_artifact(artifact or section.get("artifact"), model).absolute()
    load_artifact(directory)
    section["artifact"] = str(directory)
    # vLLM logs a plugin that does not load and serves uncompressed: make sure first that it does.
    check_command_line()
    check_plugin()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", "serve", model, "--attention-backend", "CUSTOM"]
    sys.argv += ["--additional-config", json.dumps(options), *extra]
    vllm_main()


def _merged_config(extra: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The user's own ``--additional-config`` with a section of ours in it, and the options without it.

    Like vLLM, it takes parts of it as well: ``--additional-config.kvsplice.recent_window 64``.
    """
    rest, given = [], "{}"
    parts: list[tuple[list[str], str]] = []
    arguments = iter(extra)
    for argument in arguments:
        name, _, value = argument.partition("=")
        option, *path = name.split(".")
        if option not in ("--additional-config", "--additional_config"):
            rest.append(argument)
        elif path:
            parts.append((path, value or next(arguments, "")))
        else:
            given = value or next(arguments, "{}")
    try:
        options = json.loads(given)
        for path, value in parts:
            at = options
            for name in path[:-1]:
                at = at.setdefault(name, {})
            at[path[-1]] = _value(value)
        merged = options | {"kvsplice": {} | options.get("kvsplice", {})}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise KVSpliceError(
            f"--additional-config {given} is not a JSON object, or something in it that should be one is not"
        ) from error
    return merged, rest


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


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

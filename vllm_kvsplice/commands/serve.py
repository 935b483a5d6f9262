"""`kvsplice doctor` and `kvsplice serve`: an installation that works, and the server."""

import json
import sys
from typing import Annotated, Any, Optional

import typer
from rich.text import Text

from vllm_kvsplice.commands.options import Model
from vllm_kvsplice.commands.printing import console
from vllm_kvsplice.errors import KVSpliceError


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
        # A section that is no object is a `TypeError` here.
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

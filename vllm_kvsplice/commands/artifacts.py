"""`kvsplice inspect` and `kvsplice push`: what an artifact holds, and where others find it."""

from typing import Annotated

import typer

from vllm_kvsplice.commands.options import ArtifactDir
from vllm_kvsplice.commands.printing import print_summary, print_width_map


def inspect(artifact: ArtifactDir) -> None:
    """Show what an artifact holds: the width of every layer and head, bytes, and where it comes from.

    Example: `kvsplice inspect smollm2-4bit`
    """
    from vllm_kvsplice.hub import from_pretrained

    loaded = from_pretrained(artifact)
    print_width_map(loaded)
    print_summary(loaded, str(artifact))


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

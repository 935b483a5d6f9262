"""How commands print artifacts and plans."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from calibration.planners.files import PlanFile
    from vllm_kvsplice.artifact import Artifact

# Names of files and models are not markup.
console = Console(markup=False)


def print_summary(artifact: "Artifact", title: str) -> None:
    """A table of what an artifact is, what was expected of it, and what was measured."""
    manifest, shape = artifact.manifest, artifact.manifest.model
    before, after = artifact.baseline_bytes_per_token, artifact.bytes_per_token
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("digest", artifact.digest[:16])
    table.add_row(
        "model",
        f"{manifest.provenance.model}: {shape.num_layers} layers, "
        f"{shape.num_heads} heads, {shape.num_kv_heads} KV heads of {shape.head_dim}",
    )
    dense = shape.num_layers - len(artifact.compressed_layers)
    table.add_row("layers", f"{len(artifact.compressed_layers)} compressed, {dense} dense")
    bits = f"{artifact.bits_per_element:.3f} bits per element"
    if dense:
        bits += f", {artifact.bits_where_compressed:.3f} where compressed"
    table.add_row("size", f"{after} bytes per token, {bits}")
    table.add_row("instead of", f"{before} bytes per token in 16 bits: {before / after:.2f}x smaller")
    origin = manifest.provenance
    table.add_row("fit", f"{origin.fit}, {origin.tokens} tokens of {origin.text}, {origin.created}")
    beside = f", beside an exact window of {origin.recent}" if origin.recent else ""
    table.add_row("plan", f"{origin.planner}, {origin.requested}{beside}")
    table.add_row("expected", f"perplexity {origin.expected_change_percent:+.2f} %")
    if manifest.quality:
        quality = manifest.quality
        table.add_row(
            "quality",
            f"perplexity {quality.baseline_ppl:.3f} -> {quality.ppl:.3f} ({quality.change_percent:+.2f} %) "
            f"on {quality.tokens} held-out tokens",
        )
    console.print(table)


def print_width_map(artifact: "Artifact") -> None:
    """Every layer a line, every head a run of digits: one per group of 8 latents, its width in bits."""
    console.print("Bits of each group of 8 latents, head by head (a layer a line: bytes per token, keys | values)")
    for index, layer in enumerate(artifact.manifest.layers):
        line = Text(f"{index:4d}  ")
        if layer is None:
            line.append("dense")
        else:
            line.append(f"{layer.layout.token_bytes:5d}  ")
            line.append_text(Text(" | ").join([Text(" ").join(map(_digits, k)) for k in (layer.key, layer.value)]))
        console.print(line, soft_wrap=True)


def _digits(widths: tuple[int, ...]) -> Text:
    shades = ("grey50", "blue", "cyan", "green", "green", "yellow", "yellow", "red", "red")
    return Text.assemble(*((str(width), shades[width]) for width in widths))


def print_plan(plan: "PlanFile") -> None:
    """Every head a line with its bytes and the reason, then what the whole costs and saves."""
    for layer in plan.layers:
        for head in layer.heads:
            sizes = f"{layer.layer:4d}/{head.head:<3d} {sum(head.key):3d} + {sum(head.value):<3d} bytes  "
            console.print(Text(sizes), Text(head.reason), soft_wrap=True)
    table = Table(show_header=False)
    table.add_row("planner", plan.planner)
    table.add_row(
        "size",
        f"{plan.bytes_per_token} of {plan.baseline_bytes_per_token} bytes per token, {plan.bits_per_element:.3f} bits per "
        f"element: {plan.memory_saving_percent:.1f} % less memory",
    )
    table.add_row("expected", f"perplexity {plan.expected_percent:+.2f} %, to be measured with kvsplice eval")
    console.print(table)

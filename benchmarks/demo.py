"""The whole path once, for `make demo`: model, calibration, server, a chat, and what was gained.

Results that exist under build/demo are used again; `make clean` forgets them.
"""

import argparse
import json
import subprocess
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from benchmarks.server import Server, kvsplice_command, running, vllm_command
from calibration.models import default_model
from vllm_kvsplice.artifact import load_artifact
from vllm_kvsplice.engines import DEFAULT_WINDOW

BUILD = Path("build/demo")
ARTIFACT = BUILD / "artifact"
# The same memory for both servers, in GiB (docs/vllm.md).
MEMORY = {"VLLM_CPU_KVCACHE_SPACE": "1"}
SERVE_OPTIONS = ("--max-model-len", "4096", "--enforce-eager")
QUESTION = "Why is the sky blue? Answer in one sentence."

console = Console()


def main() -> None:
    """Prepare, serve, ask, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare-only", action="store_true", help="stop once the artifact exists")
    only_prepare = parser.parse_args().prepare_only
    model = default_model()
    if not ARTIFACT.is_dir():
        recipe = ("--recent", str(DEFAULT_WINDOW), "--statistics", BUILD / "statistics.safetensors")
        _run("calibrate", model, "--out", ARTIFACT, *recipe)
    if only_prepare:
        return
    quality = _quality(model)
    stock = _stock_tokens(model)
    console.print("Starting vllm serve with the compressed cache ...")
    with running(kvsplice_command("serve", model, ARTIFACT, *SERVE_OPTIONS), BUILD / "server.log", MEMORY) as server:
        tokens = server.cache_tokens()
        answer = ask(server, str(model))
    report = {
        "question": QUESTION,
        "answer": answer,
        "kv_cache_tokens_stock": stock,
        "kv_cache_tokens": tokens,
        "kv_cache_gib": int(MEMORY["VLLM_CPU_KVCACHE_SPACE"]),
        **quality,
    }
    (BUILD / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _print(report, model)


def ask(server: Server, model: str) -> str:
    """One chat request through the OpenAI client."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=80, temperature=0
    )
    return reply.choices[0].message.content or ""


def _quality(model: Path) -> dict[str, float]:
    """Perplexity without compression and as served, measured once per artifact."""
    file = BUILD / f"eval-{load_artifact(ARTIFACT).digest[:16]}.json"
    if not file.exists():
        as_served = ("--mode", "serving", "--recent", str(DEFAULT_WINDOW))
        _run("eval", model, ARTIFACT, "--text", "pydoc", "--windows", "6", *as_served, "--json", file)
    return json.loads(file.read_text())


def _stock_tokens(model: Path) -> int:
    """KV-cache tokens of stock vLLM in the same memory, measured once."""
    file = BUILD / "stock.json"
    if not file.exists():
        console.print("Starting stock vllm serve, to compare ...")
        with running(vllm_command(model, *SERVE_OPTIONS), BUILD / "stock.log", MEMORY) as server:
            file.write_text(json.dumps({"kv_cache_tokens": server.cache_tokens()}))
    return int(json.loads(file.read_text())["kv_cache_tokens"])


def _run(*arguments: str | Path) -> None:
    subprocess.run(kvsplice_command(*arguments), check=True)


def _print(report: dict[str, object], model: Path) -> None:
    console.print(f"\n[bold]You:[/] {QUESTION}\n[bold]{model.name}:[/] {report['answer']}\n")
    table = Table("", "stock vLLM", "KVSplice", title="The same model in the same memory", title_justify="left")
    stock, ours = report["kv_cache_tokens_stock"], report["kv_cache_tokens"]
    assert isinstance(stock, int)
    assert isinstance(ours, int)
    table.add_row(f"KV-cache tokens in {report['kv_cache_gib']} GiB", f"{stock:,}", f"{ours:,} ({ours / stock:.2f}x)")
    table.add_row("bits per element", "16", f"{report['bits_per_element']:.2f}")
    table.add_row(
        "perplexity (held-out text)",
        f"{report['baseline_ppl']:.3f}",
        f"{report['ppl']:.3f} ({report['change_percent']:+.2f} %)",
    )
    console.print(table)
    console.print("Report: build/demo/report.json. Next, keep a server running: make serve", highlight=False)


if __name__ == "__main__":
    main()

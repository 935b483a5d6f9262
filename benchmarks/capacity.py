"""How many tokens a server holds before it preempts, stock and compressed, for the same memory.

    python -m benchmarks.capacity ARTIFACT [--sequences 8] [--tokens 4000] [--window 32]

Each server gets the fewest blocks for which vLLM should hold that many sequences. Clients then let all of them grow until
the server preempts the first; what it held then, divided by the bytes of all its blocks, is compared. The row goes to
build/bench/capacity.json.
"""

import argparse
import json
import random
import threading
import time
from contextlib import suppress
from pathlib import Path

from openai import APIError, OpenAI
from rich.console import Console

from benchmarks.server import STOCK_BLOCK, Server, running, vllm_command
from calibration.models import default_model
from vllm_kvsplice.artifact import load_artifact
from vllm_kvsplice.serving.plugin import WINDOWED_BLOCK_MULTIPLE
from vllm_kvsplice.serving.window_blocks import block_sizes

# Below this token id lie special tokens.
FIRST_ORDINARY = 1000
# Sequences start shorter than they must get, because early ones grow while late prompts are read.
HEADROOM = 96
RESULT = Path("build/bench/capacity.json")
MEMORY = {"VLLM_CPU_KVCACHE_SPACE": "2"}

console = Console()


def main() -> None:
    """Fill both servers, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, help="of the default model")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4000, help="of a sequence")
    parser.add_argument("--window", type=int, default=32)
    options = parser.parse_args()
    artifact, model = load_artifact(options.artifact), default_model()
    dense, sequences, tokens = artifact.baseline_bytes_per_token, options.sequences, options.tokens
    sizes = block_sizes(artifact.bytes_per_token, dense, options.window, WINDOWED_BLOCK_MULTIPLE, None)
    # Block 0 is nobody's.
    ours = sizes.pool_blocks(sequences, tokens, options.window) + 1
    stock = sequences * -(-tokens // STOCK_BLOCK) + 1
    section = {"kvsplice": {"artifact": str(options.artifact), "recent_window": options.window}}
    config = ("--attention-backend", "CUSTOM", "--additional-config", json.dumps(section))
    row = {
        "sequences": sequences,
        "tokens": tokens,
        "window": options.window,
        "bits": artifact.bits_per_element,
        "stock": _measure(vllm_command(model, *_options(stock, tokens)), "stock", sequences, tokens),
        "ours": _measure(vllm_command(model, *_options(ours, tokens), *config), "ours", sequences, tokens),
        "stock_bytes": stock * STOCK_BLOCK * dense,
        "ours_bytes": ours * sizes.block_bytes,
    }
    row["ratio"] = (row["ours"] / row["ours_bytes"]) / (row["stock"] / row["stock_bytes"])
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps([row], indent=1) + "\n")
    console.print_json(data=row)


def _options(blocks: int, tokens: int) -> tuple[str, ...]:
    length = ("--max-model-len", str(2 * tokens), "--num-gpu-blocks-override", str(blocks))
    return (*length, "--dtype", "bfloat16", "--enforce-eager")


def _measure(command: list[str], name: str, sequences: int, tokens: int) -> int:
    """Tokens held by all sequences when the server first preempts one."""
    console.print(f"Starting the {name} server ...")
    with running(command, RESULT.parent / f"capacity-{name}.log", MEMORY) as server:
        clients = [
            threading.Thread(target=_grow, args=(server, index, tokens), daemon=True) for index in range(sequences)
        ]
        for client in clients:
            client.start()
        held = 0
        # vLLM counts a preemption only when the request goes on; that fewer run shows at once.
        while (running_now := server.metric("vllm:num_requests_running")) == sequences or not held:
            if not all(client.is_alive() for client in clients):
                raise RuntimeError(f"the {name} server answered a request before it preempted any")
            if running_now == sequences:
                held = int(sequences * (tokens - HEADROOM) + server.metric("vllm:generation_tokens_total"))
            time.sleep(0.05)
        return held


def _grow(server: Server, index: int, tokens: int) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0)
    prompt = random.Random(index).choices(range(FIRST_ORDINARY, 40000), k=tokens - HEADROOM)
    model = client.models.list().data[0].id
    # The server is stopped while it still answers.
    with suppress(APIError):
        client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
        )


if __name__ == "__main__":
    main()

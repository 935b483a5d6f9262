"""Whole vLLM servers on this machine's GPU, one after the other: tokens per second at long context.

    python -m benchmarks.gpu_server --model DIR --artifact DIR [--caches ours bfloat16 fp8 turboquant] [--requests 32]

Each server gets the same memory, random prompts of the same lengths, all at once, and answers without end of text. Decoding
is timed while all answers are under way; a server that cannot hold all requests preempts or queues some, as in real use,
so the time for everything is written too. Name fewer caches to stay below a time limit. Rows are appended to
benchmarks/results/gpu_server.csv.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import vllm
from rich.console import Console

from benchmarks.gpu import append, commit
from benchmarks.server import Server, kvsplice_command, running, vllm_command
from benchmarks.serving import BENCH, Case, ask, decode_speed
from calibration.models import default_model
from vllm_kvsplice.artifact import load_artifact
from vllm_kvsplice.engines.triton.tables import reads_fast
from vllm_kvsplice.serving.backend import UNEVEN

RESULTS = Path(__file__).parent / "results" / "gpu_server.csv"
# Options of stock vLLM for each cache that ours is compared with.
STOCK = {
    "bfloat16": (),
    "fp8": ("--kv-cache-dtype", "fp8"),
    "turboquant": ("--kv-cache-dtype", "turboquant_4bit_nc"),
}

console = Console()


def measure(server: Server, case: Case, rounds: int) -> dict[str, object]:
    """Medians over rounds after one that warms up."""
    speed, first, whole = [], [], []
    for number in range(rounds + 1):
        begin = time.monotonic()
        streams = ask(server, case, number)
        if number:
            whole.append(time.monotonic() - begin)
            first.append(statistics.mean(arrivals[0] for arrivals in streams))
            # Where some answers begin after others have ended, none are all under way.
            together = max(a[0] for a in streams) < min(a[-1] for a in streams)
            speed.append(decode_speed(streams) if together else 0.0)
    tokens = case.requests * case.answer
    return {
        "decode_tokens_s": f"{statistics.median(speed):.1f}",
        "tokens_s": f"{tokens / statistics.median(whole):.1f}",
        "first_token_s": f"{statistics.median(first):.2f}",
        "cache_tokens": server.cache_tokens(),
        "preemptions": int(server.metric("vllm:num_preemptions_total")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of the model; by default the one of `make demo`")
    parser.add_argument("--artifact", type=Path, required=True, help="of that model, calibrated with --fit pca_uniform")
    parser.add_argument("--caches", nargs="+", choices=["ours", *STOCK], default=["ours", *STOCK])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=7000, help="tokens")
    parser.add_argument("--answer", type=int, default=256, help="tokens")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; run this on a machine with one")
    case = Case("gpu", options.requests, options.prompt, options.answer)
    if not all(map(reads_fast, load_artifact(options.artifact).codecs.values())):
        sys.exit(f"{options.artifact}: {UNEVEN}")
    model = options.model or default_model()
    common = ("--max-model-len", str(case.prompt + case.answer + 16), "--dtype", "bfloat16")
    commands = {name: vllm_command(model, *common, *extra) for name, extra in STOCK.items()}
    commands["ours"] = kvsplice_command("serve", model, options.artifact, *common)
    about = {"gpu": torch.cuda.get_device_name(), "vllm": vllm.__version__, "torch": torch.__version__}
    about |= {"commit": commit(), "model": Path(model).name, "artifact": options.artifact.name}
    for name in options.caches:
        console.print(f"Starting the server with the cache {name} ...")
        with running(commands[name], BENCH / f"gpu-{name}.log") as server:
            row = about | {"cache": name, **vars(case)} | measure(server, case, options.rounds)
        console.print(row)
        append(RESULTS, row)


if __name__ == "__main__":
    main()

"""A whole server against stock vLLM, for `make bench-server`: decode throughput and time to first token over HTTP.

    python -m benchmarks.serving [--artifact A] [--rounds 3] [--case long|short]

Both servers run at once and are asked the same prompts in turn, one idle while the other answers. Prompts are random
tokens that no prefix cache has seen. Rows (medians over rounds) go to build/bench/server.json.
"""

import argparse
import json
import random
import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from benchmarks.demo import ARTIFACT
from benchmarks.server import Server, kvsplice_command, running, vllm_command
from calibration.models import default_model

BENCH = Path("build/bench")
RESULT = BENCH / "server.json"
# In GiB: room for eight of the long sequences in a stock cache.
MEMORY = {"VLLM_CPU_KVCACHE_SPACE": "1"}
OPTIONS = ("--max-model-len", "8192", "--dtype", "bfloat16")
# Below and above these token ids lie special tokens and the end of the vocabulary.
ORDINARY = range(1000, 40000)

console = Console()


@dataclass(frozen=True)
class Case:
    """Requests sent at the same moment, tokens of each prompt, and tokens of each answer."""

    name: str
    requests: int
    prompt: int
    answer: int


CASES = {"long": Case("8 x 4000 tokens", 8, 4000, 128), "short": Case("1 x 16 tokens", 1, 16, 128)}


# When each token of an answer came, in seconds since the request was sent.
Arrivals = list[float]


def main() -> None:
    """Start both, ask in turn, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, default=ARTIFACT, help="of the default model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES, action="append", help="only this one")
    options = parser.parse_args()
    model, artifact = default_model(), options.artifact
    commands = {
        "stock": vllm_command(model, *OPTIONS),
        "ours": kvsplice_command("serve", model, artifact, *OPTIONS),
    }
    rows = []
    with ExitStack() as stack:
        servers = {}
        for name, command in commands.items():
            console.print(f"Starting the {name} server ...")
            servers[name] = stack.enter_context(running(command, BENCH / f"server-{name}.log", MEMORY))
        for case in (CASES[name] for name in options.case or CASES):
            rows += _compare(servers, case, options.rounds)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    _print(rows)


def _compare(servers: dict[str, Server], case: Case, rounds: int) -> list[dict[str, object]]:
    """Rows of one case: tokens per second once all answers have begun, and mean seconds to the first token."""
    speed: dict[str, list[float]] = {name: [] for name in servers}
    first: dict[str, list[float]] = {name: [] for name in servers}
    # The first round warms both up.
    for number in range(rounds + 1):
        for name, server in servers.items():
            streams = ask(server, case, number)
            if number:
                speed[name].append(decode_speed(streams))
                first[name].append(statistics.mean(arrivals[0] for arrivals in streams))
                console.print(f"{case.name}, {name}: {speed[name][-1]:.1f} tokens/s, {first[name][-1]:.3f} s")
    decode = {name: statistics.median(values) for name, values in speed.items()}
    wait = {name: statistics.median(values) for name, values in first.items()}
    return [
        _row(case, "decode", decode, decode["ours"] / decode["stock"], "tokens/s"),
        _row(case, "time to first token", wait, wait["stock"] / wait["ours"], "s"),
    ]


def _row(case: Case, bench: str, figures: dict[str, float], ratio: float, unit: str) -> dict[str, object]:
    return {"bench": bench, "case": case.name, **figures, "ratio": ratio, "unit": unit}


def ask(server: Server, case: Case, number: int) -> list[Arrivals]:
    """When each token of the case's answers came; `number` makes the prompts new ones."""
    streams: list[Arrivals] = [[] for _ in range(case.requests)]
    chance = random.Random(f"{case.name} {number}")
    prompts = [chance.choices(ORDINARY, k=case.prompt) for _ in streams]
    threads = [
        threading.Thread(target=_read, args=(server, prompt, case.answer, arrivals))
        for prompt, arrivals in zip(prompts, streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(len(arrivals) != case.answer for arrivals in streams):
        raise RuntimeError(f"an answer of {case.answer} tokens came short; see {server.log}")
    return streams


def _read(server: Server, prompt: list[int], answer: int, arrivals: Arrivals) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=1200, max_retries=0)
    model = client.models.list().data[0].id
    usage = {"include_usage": True, "continuous_usage_stats": True}
    begin = time.monotonic()
    reply = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=answer,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "stream_options": usage},
    )
    for chunk in reply:
        told = chunk.usage.completion_tokens if chunk.usage else 0
        arrivals += [time.monotonic() - begin] * (told - len(arrivals))


def decode_speed(streams: list[Arrivals]) -> float:
    """Tokens per second from when the last answer began until the first one ended."""
    begin = max(arrivals[0] for arrivals in streams)
    end = min(arrivals[-1] for arrivals in streams)
    count = sum(begin < arrival <= end for arrivals in streams for arrival in arrivals)
    return count / (end - begin)


def _print(rows: list[dict[str, object]]) -> None:
    table = Table("bench", "case", "stock", "ours", "ratio", "unit", title="Whole server", title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    console.print(f"Wrote {RESULT}")


if __name__ == "__main__":
    main()

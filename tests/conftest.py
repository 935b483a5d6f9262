"""Session-wide fixtures: the real model, artifacts of it, and running servers. Each is made once, when first asked for."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tests.engines.device  # noqa: F401  before anything imports Triton
from benchmarks.server import Server, running
from calibration.models import default_model
from calibration.planners import make_plan
from calibration.recipe import CalibrationConfig
from calibration.study import Study, study
from tests.serving import CACHE_BYTES
from vllm_kvsplice.artifact import save_artifact

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with servers first: they take longest, and what several processes end with should be short."""
    long = {item.path for item in items if item.get_closest_marker("server")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def smollm() -> Path:
    """Directory of the real SmolLM2-135M-Instruct."""
    return default_model()


@pytest.fixture(scope="session")
def smollm_study(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """SmolLM2, measured on half of the usual text: the tests here are not about quality."""
    folder = tmp_path_factory.getbasetemp()
    # Of several processes those that come later take what the first has measured.
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return study(str(smollm), CalibrationConfig(tokens=8192, context=512), shared / "smollm.safetensors")


@pytest.fixture(scope="session")
def smollm_artifact(smollm_study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact at 4 bits."""
    plan = make_plan(smollm_study.evidence, CalibrationConfig(bits=4), smollm_study.budget_for(4))
    out = tmp_path_factory.mktemp("artifacts") / "4"
    save_artifact(smollm_study.artifact(plan), out)
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, list[str]]], dict[str, Server]]]:
    """Start servers that live until the module's tests are over, given by name and command.

    They start together: a start is mostly one thread's work.
    """
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:

        def begin(commands: dict[str, list[str]]) -> dict[str, Server]:
            # One core each, which is what vLLM chooses on two, but it chooses the same for all.
            cores = cycle(sorted(os.sched_getaffinity(0)))
            servers = []
            for (name, command), core in zip(commands.items(), cores, strict=False):
                # Kernels are interpreted in tests alone.
                environment = {"VLLM_CPU_OMP_THREADS_BIND": str(core), "TRITON_INTERPRET": "0"}
                memory = ["--kv-cache-memory-bytes", str(CACHE_BYTES)]
                servers.append(running([*command, *memory], folder / f"{name}.log", environment))
            with ThreadPoolExecutor(len(commands)) as pool:
                return dict(zip(commands, pool.map(stack.enter_context, servers), strict=True))

        yield begin


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Browser"]:
    """The headless Chromium that `make test` installs beside the packages."""
    # Only here, because machines that run kernels' tests alone need none.
    from playwright.sync_api import sync_playwright

    home = Path(sys.prefix) / "browser"
    if not (home / "chromium").exists():
        pytest.fail(f"there is no browser in {home}; install it with: make {home}/chromium")
    fonts = tmp_path_factory.mktemp("fonts") / "fonts.conf"
    fonts.write_text(f"<fontconfig><dir>{home / 'fonts'}</dir><cachedir>{fonts.parent}</cachedir></fontconfig>")
    environment = os.environ | {"LD_LIBRARY_PATH": str(home / "al2023/lib"), "FONTCONFIG_FILE": str(fonts)}
    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to start for root, which is what tests in containers run as.
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=home / "chromium", env=environment, args=options)
        yield browser
        browser.close()

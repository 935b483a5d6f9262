"""What the sources never do: run code from data, talk to the network, start programs, or swallow errors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("vllm_kvsplice", "calibration") for path in (ROOT / package).rglob("*.py"))

MODULES = {
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("socket", "socketserver", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib"),
    *("subprocess", "pty", "ctypes", "cffi", "code", "runpy", "imp"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *("torch.load", "torch.save", "torch.hub", "torch.package", "torch.jit.load"),
    *("numpy.load", "np.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "os.fork", "os.forkpty", "importlib.import_module"),
}
PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn")


def dotted(node: ast.expr) -> str:
    """`a.b.c` as text, "" for anything that is not names all the way."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def banned_name(name: str) -> bool:
    return name in ATTRIBUTES or name.startswith(PREFIXES) or name.split(".")[0] in MODULES


def violations(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything banned."""
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if banned_name(alias.name)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in names if banned_name(name)]
        elif isinstance(node, ast.Attribute):
            found = [name for name in [dotted(node)] if name in ATTRIBUTES or name.startswith(PREFIXES)]
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            found = [node.id]
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell", "allow_pickle"):
            found = [node.arg] if not (isinstance(node.value, ast.Constant) and not node.value.value) else []
        elif isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(line, ast.Pass) or is_constant(line) for line in node.body)
            found = ["except: pass"] if silent else ["bare except"] if node.type is None else []
        yield from ((getattr(node, "lineno", 0), name) for name in found)


def is_constant(line: ast.stmt) -> bool:
    """Whether a line is but a docstring or an ellipsis."""
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_does_nothing_banned(path: Path) -> None:
    assert list(violations(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("import pickle as p", "pickle"),
        ("from urllib import request", "urllib.request"),
        ("from urllib.request import urlopen", "urllib.request.urlopen"),
        ("def f():\n    import socket", "socket"),
        ("from torch import load", "torch.load"),
        ("torch.load(path)", "torch.load"),
        ("read = torch.load", "torch.load"),
        ("from os import execv", "os.execv"),
        ("os.execvpe('vllm', [], {})", "os.execvpe"),
        ("os.system('true')", "os.system"),
        ("eval('1')", "eval"),
        ("run = exec", "exec"),
        ("load(name, trust_remote_code=True)", "trust_remote_code"),
        ("load(name, trust_remote_code=given)", "trust_remote_code"),
        ("try:\n    f()\nexcept OSError:\n    pass", "except: pass"),
        ("try:\n    f()\nexcept OSError:\n    ...", "except: pass"),
        ("try:\n    f()\nexcept:\n    g()", "bare except"),
    ],
)
def test_the_search_finds(source: str, name: str) -> None:
    assert [what for _, what in violations(source)] == [name]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile('x')",
        "safetensors.torch.load(content)",
        "from vllm_kvsplice.codec import LayerCodec",
        "load(name, trust_remote_code=False)",
        "for f in choices:\n    try:\n        f()\n    except OSError:\n        continue",
        "try:\n    f()\nexcept OSError as error:\n    raise ValueError from error",
    ],
)
def test_the_search_passes(source: str) -> None:
    assert not list(violations(source))


def test_the_search_sees_both_packages() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {
        "vllm_kvsplice/artifact/manifest.py",
        "vllm_kvsplice/engines/reference.py",
        "calibration/pipeline.py",
    } <= names

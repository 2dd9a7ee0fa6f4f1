"""The direction of imports, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "doge_deploy"

ORDER = [
    "ground",
    "signature",
    "checkpoint",
    "engine",
    "bundle",
    "genai_config",
    "engine_store",
    "model",
    "plugins",
    "graph",
    "targets",
    "export",
    "build",
    "runtime",
    "verify",
    "bench",
    "doctor",
    "cli",
]
"""Each room imports only rooms before it (and itself)."""

GROUND = {"errors", "findings", "config", "config_keys", "rope_config", "revisions"}
GROUND |= {"options", "build_options", "__init__", "demo"}
GROUND |= {"products", "device_facts", "backends", "published", "host", "expert_pairs"}

ALLOWED_BACK: set[tuple[str, str]] = set()


def room(parts: tuple[str, ...]) -> str:
    name = parts[0] if parts else "__init__"
    return "ground" if name in GROUND else name


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_room_imports_only_leftward(path: Path) -> None:
    own = room(path.relative_to(PACKAGE).with_suffix("").parts)
    for module in imports(path):
        if not module.startswith("doge_deploy."):
            continue
        other = room(tuple(module.split(".")[1:]))
        if other not in ORDER:  # a name of doge_deploy/__init__.py
            continue
        assert ORDER.index(other) <= ORDER.index(own), f"{own} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_only_the_command_line_imports_click(path: Path) -> None:
    uses = {module.split(".")[0] for module in imports(path)}
    assert "click" not in uses or path.relative_to(PACKAGE).parts[0] == "cli"


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(output.split("\n"))


HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "pydantic", "rich", "tensorrt", "tensorrt_rtx"}


def test_help_imports_nothing_heavy() -> None:
    code = "from doge_deploy.cli.main import run_command\nassert run_command(['--help']) == 0"
    assert not HEAVY & modules_after(code)


@pytest.mark.parametrize("command", ["doctor", "export", "build", "verify", "generate", "bench", "inspect"])
def test_help_of_a_command_imports_neither_torch_nor_a_runtime(command: str) -> None:
    code = f"from doge_deploy.cli.main import run_command\nassert run_command([{command!r}, '--help']) == 0"
    assert not {"torch", "transformers", "onnxruntime", "tensorrt", "tensorrt_rtx"} & modules_after(code)


def test_the_runtime_needs_neither_torch_nor_transformers_nor_the_graph() -> None:
    names = ", ".join(f"doge_deploy.runtime.{name}" for name in ("base", "ort", "sampling", "tokenizer", "generate"))
    found = modules_after(f"import {names}")
    assert not {"torch", "transformers", "onnx", "doge_deploy.graph", "doge_deploy.model"} & found

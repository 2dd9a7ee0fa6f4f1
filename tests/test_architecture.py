"""The direction of imports, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import architecture_page
import pytest

PACKAGE = Path(__file__).parent.parent / "doge_deploy"

ORDER = [
    {"__init__", "errors", "diagnostics", "dtypes", "demo", "export_configs"},
    {"process"},
    {"config", "options"},
    {"devices", "bundle", "text"},
    {"checkpoint"},
    {"model"},
    {"kernels"},
    {"graph"},
    {"targets"},
    {"pipelines"},
    {"runtime"},
    {"verify"},
    {"doctor", "serve"},
    {"bench"},
    {"api"},
    {"cli", "testing"},
]
"""Every package and root module; each imports only from its own set and from those before it."""

LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}


def level(parts: tuple[str, ...]) -> int:
    name = parts[0] if parts else "__init__"
    assert name in LEVELS, f"doge_deploy.{name} is not in docs/architecture.md: give it a place there and in ORDER"
    return LEVELS[name]


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
    own = path.relative_to(PACKAGE).with_suffix("").parts
    if own == ("__init__",):  # names what api.py offers to type checkers; a test below says that it imports nothing
        return
    for module in imports(path):
        package, *rest = module.split(".")
        if package != "doge_deploy" or rest == ["__version__"]:
            continue
        assert level(tuple(rest)) <= level(own), f"{'.'.join(own)} imports {module}"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_files(files: dict[str, set[str]]) -> dict[str, set[str]]:
    """Of each module the modules that it names; `from package import module` names the module, not the package."""
    found: dict[str, set[str]] = {}
    for name, named in files.items():
        modules = {module for module in named if module in files and module != name}
        found[name] = {module for module in modules if not any(one.startswith(f"{module}.") for one in modules)}
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {module_name(path): set(imports(path)) for path in FILES if path != PACKAGE / "__init__.py"}
    graph = imported_files(files)
    assert sum(map(len, graph.values())) > 1000
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_a_circle_is_seen() -> None:
    one_another = {"p": {"p.a"}, "p.a": {"p", "p.b"}, "p.b": {"p.a", "p.a.Name"}}
    with pytest.raises(CycleError):
        TopologicalSorter(imported_files(one_another)).prepare()


def test_the_root_of_the_package_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_only_the_command_line_imports_click(path: Path) -> None:
    uses = {module.split(".")[0] for module in imports(path)}
    assert "click" not in uses or path.relative_to(PACKAGE).parts[0] == "cli"


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(output.split("\n"))


HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "pydantic", "rich", "tensorrt", "tensorrt_rtx"}


def test_importing_the_package_imports_none_of_its_modules() -> None:
    new = modules_after("import doge_deploy") - modules_after("")
    assert {name for name in new if name.startswith("doge_deploy")} == {"doge_deploy"}
    assert not {name.split(".")[0] for name in new} - set(sys.stdlib_module_names) - {"doge_deploy"}


def test_help_imports_nothing_heavy() -> None:
    code = "from doge_deploy.cli.main import run_command\nassert run_command(['--help']) == 0"
    assert not HEAVY & modules_after(code)


@pytest.mark.parametrize(
    "command", ["doctor", "export", "build", "verify", "bisect", "generate", "serve", "bench", "inspect"]
)
def test_help_of_a_command_imports_neither_torch_nor_a_runtime(command: str) -> None:
    code = f"from doge_deploy.cli.main import run_command\nassert run_command([{command!r}, '--help']) == 0"
    assert not {"torch", "transformers", "onnxruntime", "tensorrt", "tensorrt_rtx"} & modules_after(code)


def test_the_runtime_needs_neither_torch_nor_transformers_nor_the_graph() -> None:
    names = ", ".join(f"doge_deploy.runtime.{name}" for name in ("base", "ort", "sampling", "tokenizer", "generate"))
    found = modules_after(f"import {names}")
    assert not {"torch", "transformers", "onnx", "doge_deploy.graph", "doge_deploy.model"} & found


GENERATE = """
from doge_deploy.cli.main import run_command
names, sys.stdout = sys.stdout, sys.stderr
assert run_command(["generate", {bundle!r}, "--prompt", "The", "--greedy", "--max-new-tokens", "1", "--quiet"]) == 0
sys.stdout = names
"""

NOT_FOR_GENERATE = {"click.shell_completion", "numpy.random", "numpy.ma", "importlib.metadata", "asyncio", "subprocess"}


def test_generate_imports_little_beyond_its_libraries(tiny_bundle: Path) -> None:
    libraries = modules_after("import numpy, onnxruntime, tokenizers")
    found = modules_after(GENERATE.format(bundle=str(tiny_bundle))) - libraries
    others = {name.split(".")[0] for name in found - {""}} - {name.split(".")[0] for name in libraries}
    assert others - set(sys.stdlib_module_names) == {"click", "doge_deploy"}
    assert not NOT_FOR_GENERATE & found


def test_a_judge_needs_neither_torch_nor_transformers_nor_onnx() -> None:
    names = ("run", "files", "markdown", "baseline", "node_data", "page.write")
    found = modules_after(f"import {', '.join(f'doge_deploy.verify.{name}' for name in names)}")
    assert not {"torch", "transformers", "onnx", "onnx_ir", "safetensors", "doge_deploy.verify.live"} & found


def test_the_page_has_a_line_for_every_file() -> None:
    text = architecture_page.PAGE.read_text(encoding="utf-8")
    assert text == architecture_page.page(text), "run python tests/architecture_page.py"

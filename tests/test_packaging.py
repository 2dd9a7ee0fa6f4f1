"""The package as others get it: an sdist, the wheel of it, and that wheel in a new environment with one runtime."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from base_install import MISSING

import doge_deploy

ROOT = Path(__file__).parent.parent
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"

REALLY_MISSING = {name: row for name, row in MISSING.items() if row[1] != "PyYAML"}
"""PyYAML comes with the Hub's client, which tokenizers requires; tests/test_base_install.py leaves both out."""


def test_the_version_is_written_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", doge_deploy.__version__)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")  # the one other place, for programs that cite
    assert f"\nversion: {doge_deploy.__version__}\n" in citation
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project and not re.search(r"^version = \"", project, re.MULTILINE)


class Environment:
    """A new virtual environment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)

    def pip(self, *arguments: str | Path) -> str:
        words = [str(argument) for argument in arguments]
        return self.run("python", "-m", "pip", "--disable-pip-version-check", *words, good=True).stdout

    def run(self, program: str, *arguments: str, good: bool = False) -> subprocess.CompletedProcess[str]:
        # nothing of the environment of the tests: neither its packages nor its working directory
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = [str(self._folder / "bin" / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self._folder, env=environment)
        assert not good or done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of a copy of this tree, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("doge_deploy", "plugins", "export_configs", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    builder = Environment(folder / "builder")
    builder.pip("install", "setuptools>=77")
    done = builder.run("python", "-c", f"import os; os.chdir({str(tree)!r}); {BUILD_SDIST}", str(folder), good=True)
    assert done.returncode == 0
    (sdist,) = folder.glob("*.tar.gz")
    builder.pip("wheel", "--no-deps", "-w", folder, sdist)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel with the extra `cpu`, and nothing else."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.pip("install", "-c", ROOT / "constraints.txt", f"{files[1]}[cpu]")
    return environment


@pytest.mark.sweep
class TestFiles:
    def test_names(self, files: tuple[Path, Path]) -> None:
        version = doge_deploy.__version__
        assert [file.name for file in files] == [
            f"doge_deploy-{version}.tar.gz",
            f"doge_deploy-{version}-py3-none-any.whl",
        ]

    def test_the_wheel_holds_the_two_packages_and_their_data(self, files: tuple[Path, Path]) -> None:
        with zipfile.ZipFile(files[1]) as wheel:
            held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        wanted = {
            str(Path("doge_deploy") / path.relative_to(ROOT / "doge_deploy"))
            for path in (ROOT / "doge_deploy").rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        wanted |= {f"doge_deploy/export_configs/{path.name}" for path in (ROOT / "export_configs").glob("*.yaml")}
        wanted |= {
            str(Path("doge_plugins") / path.relative_to(ROOT / "plugins")) for path in (ROOT / "plugins").rglob("*.py")
        }
        assert held == wanted
        assert {"doge_deploy/py.typed", "doge_deploy/demo/doge-tiny/model.safetensors"} < held

    def test_the_sdist_holds_no_tests(self, files: tuple[Path, Path]) -> None:
        with tarfile.open(files[0]) as sdist:
            tops = {Path(name).parts[1] for name in sdist.getnames() if len(Path(name).parts) > 1}
        assert {"doge_deploy", "plugins", "pyproject.toml", "setup.py"} <= tops
        assert "tests" not in tops


@pytest.mark.sweep
class TestInstalled:
    def test_what_is_installed(self, installed: Environment) -> None:
        names = set(installed.pip("list", "--format=freeze").lower().replace("_", "-").split())
        held = {line.split("==")[0] for line in names}
        assert {"doge-deploy", "onnxruntime", "tokenizers"} <= held
        assert not held & {"torch", "transformers", "onnxscript", "onnx", "onnx-ir", "safetensors"}

    def test_generate(self, installed: Environment, tiny_bundle: Path) -> None:
        arguments = [str(tiny_bundle), "--prompt", "A list is", "--greedy", "--quiet", "--max-new-tokens", "24"]
        done = installed.run("doge-deploy", "generate", *arguments, good=True)
        with doge_deploy.load(tiny_bundle) as model:
            assert done.stdout == model.generate("A list is", do_sample=False, max_new_tokens=24).text + "\n"

    def test_the_python_api(self, installed: Environment, tiny_bundle: Path) -> None:
        code = f"import doge_deploy; print(doge_deploy.load({str(tiny_bundle)!r}).logits([5, 6]).shape)"
        assert installed.run("python", "-c", code, good=True).stdout == "(2, 1024)\n"

    def test_inspect_doctor_and_plugins(self, installed: Environment, tiny_bundle: Path) -> None:
        shown = installed.run("doge-deploy", "inspect", str(tiny_bundle), good=True).stdout
        assert "every sha256 as in the manifest" in shown
        assert "ort" in installed.run("doge-deploy", "doctor", str(tiny_bundle), good=True).stdout
        assert "CDMoE" in installed.run("doge-deploy", "plugins", "list", good=True).stdout
        version = installed.run("doge-deploy", "--version", good=True).stdout
        assert version.strip().endswith(doge_deploy.__version__)

    @pytest.mark.parametrize(("arguments", "says", "extra"), REALLY_MISSING.values(), ids=REALLY_MISSING.keys())
    def test_other_commands_say_what_is_missing(
        self, arguments: list[str], says: str, extra: str, installed: Environment
    ) -> None:
        done = installed.run("doge-deploy", *arguments)
        assert done.returncode == 4, done
        assert re.fullmatch(rf"doge-deploy: error: .*{re.escape(says)}.*'doge-deploy\[{extra}\]'.*\n", done.stderr)

"""Install the wheel of a release where nothing else is, and use it; then run it by pipx.

    python tests/release/install.py FOLDER SDIST WHEEL

FOLDER is an empty one for environments. The bundle that is run is made by `.venv/bin/doge-deploy` if `make setup` has
been run; without it only what needs no bundle is done.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """Run a command outside of the clone; its output. An error ends this program."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIPX"))}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env={**plain, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"$ {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def expect(text: str, wanted: str) -> None:
    """End the program unless an output has what it must have."""
    if wanted not in text:
        sys.exit(f"{wanted!r} is not in:\n{text}")


def main(folder: Path, sdist: Path, wheel: Path) -> None:
    """Do it."""
    match = re.fullmatch(r"doge_deploy-(\d+\.\d+\.\d+)-py3-none-any\.whl", wheel.name)
    if match is None or sdist.name != f"doge_deploy-{match[1]}.tar.gz":
        sys.exit(f"{sdist.name} and {wheel.name} are not the files of one release")
    version = match[1]
    run(sys.executable, "-m", "venv", folder / "clean", folder=folder)
    pip = [folder / "clean" / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]", folder=folder)
    run(*pip, "check", folder=folder)
    tool = folder / "clean" / "bin" / "doge-deploy"
    expect(run(tool, "--version", folder=folder), version)
    expect(run(tool, "doctor", folder=folder), "yes  generate --backend ort")
    exporter = ROOT / ".venv" / "bin" / "doge-deploy"
    if exporter.exists():
        run(exporter, "export", "doge-tiny", "-o", folder / "tiny", folder=folder)
        text = run(tool, "generate", "tiny", "--chat", "--greedy", "--prompt", "What is a list?", folder=folder)
        expect(text, "A list display is a list")
    home = {"PIPX_HOME": str(folder / "pipx"), "PIPX_BIN_DIR": str(folder / "bin")}
    options = f"--pip-args=--constraint {ROOT / 'constraints.txt'}"
    command = [sys.executable, "-m", "pipx", "run", options, "--spec", f"{wheel}[cpu]", "doge-deploy", "--version"]
    expect(run(*command, folder=folder, **home), version)
    print(f"{wheel.name}: installed clean on Python {sys.version.split()[0]}, used, and run by pipx")


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:4]))

"""`doge-deploy bisect` of one bundle in two environments: the package by which they differ is named.

`nox -s bisect-packages` runs it in the environment of `make setup`, with the interpreter of another as argument.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def main(other: str) -> None:
    doge_deploy = [sys.executable, "-m", "doge_deploy.cli"]
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(Path(folder, "doge-tiny"))
        subprocess.run([*doge_deploy, "export", "doge-tiny", "-o", bundle], check=True, capture_output=True)
        alone = subprocess.run([*doge_deploy, "bisect", bundle, bundle, "--bad-python", sys.executable], check=False)
        assert alone.returncode == 0, "an environment must be like itself"
        command = [*doge_deploy, "bisect", bundle, bundle, "--bad-python", other]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stdout.write(done.stdout)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"the package onnxruntime {version('onnxruntime')} -> "), done.stdout


if __name__ == "__main__":
    main(sys.argv[1])

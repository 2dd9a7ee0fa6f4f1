"""Complete the folder of `make gpu-check`: every wheel that the check needs, and the one command to run.

    python prepare.py FOLDER

The wheels are for this Python and this processor; the machine with the GPU needs the same Python, and no network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]

WHEELS = ("numpy", "cuda-core", "cuda-bindings", "cuda-pathfinder")
"""With doge-deploy itself all that `python -m doge_deploy.verify.kernels` imports."""

MOST_BYTES = 60 * 2**20

COMMAND = """\
#!/bin/sh
# Runs the kernels on this machine's GPU and compares what comes out. Needs Python {version} and NVIDIA's driver.
set -e
cd "$(dirname "$0")"
rm -rf packages
mkdir packages
for wheel in wheels/*.whl; do python{version} -m zipfile -e "$wheel" packages; done
PYTHONPATH=packages exec python{version} -m doge_deploy.verify.kernels kernels.recording
"""


def main(folder: Path) -> None:
    """Write wheels and command into `folder`, which holds the recording.

    Raises:
        SystemExit: the folder is larger than what fits.
    """
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    limits = ["-c", str(ROOT / "constraints.txt"), "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "download", *limits, "-d", str(wheels), *WHEELS], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    script = folder / "run.sh"
    script.write_text(COMMAND.format(version=sysconfig.get_python_version()))
    script.chmod(0o755)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    sys.stdout.write(f"{folder}: {size / 2**20:.1f} MiB; copy it and run {script.name}\n")
    if size > MOST_BYTES:
        raise SystemExit(f"{folder} is larger than {MOST_BYTES / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

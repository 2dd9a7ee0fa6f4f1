"""A build in a process of its own, seen from the command that waits for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from doge_deploy.errors import MissingDependencyError, UnsupportedModelError, UsageError
from doge_deploy.process.progress import Progress
from doge_deploy.targets.trt.job import EVENTS, Advanced, Failed, Finished, Job
from doge_deploy.targets.trt.vendor import PRODUCTS

WORKER = (sys.executable, "-m", "doge_deploy.targets.trt.worker")

_LOG_LINES = 3
"""Lines of the vendor's log that are quoted where its library ended the process."""

_ERRORS = {"usage": UsageError, "unsupported": UnsupportedModelError, "missing": MissingDependencyError}


def run_job(job: Job, folder: Path, progress: Progress) -> Finished:
    """Build in a process of its own, which ends with this one.

    Raises:
        UsageError, UnsupportedModelError, MissingDependencyError: what the process reports, or that it broke down.
    """
    (folder / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
    log_file = folder / "log.txt"
    advance = progress.stage("build engine", total=1000)
    command = [*WORKER, str(folder / "job.json")]
    result: Finished | Failed | None = None
    told = 0
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8")
        try:
            assert process.stdout is not None
            for line in process.stdout:
                event = EVENTS.validate_json(line)
                if isinstance(event, Advanced):
                    now = int(event.fraction * 1000)
                    advance(now - told)
                    told = now
                else:
                    result = event
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    if isinstance(result, Failed):
        raise _ERRORS[result.kind](result.message)
    if result is None or status != 0:
        raise MissingDependencyError(_breakdown(PRODUCTS[job.target].name, status, log_file))
    advance(1000 - told)
    for file in (log_file, folder / "job.json"):
        file.unlink()
    return result


def _breakdown(product: str, status: int, log_file: Path) -> str:
    """One line about a process that ended without a result."""
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = [
        line.strip() for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    ]
    last = " | ".join(lines[-_LOG_LINES:]) or "nothing"
    return f"the library of {product} broke down: its process {ended}; its last words: {last}"

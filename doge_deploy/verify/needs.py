"""Which packages a verification needs."""

from __future__ import annotations

from pathlib import Path

from doge_deploy.devices.packages import require_export_packages
from doge_deploy.errors import MissingDependencyError
from doge_deploy.options.backends import TORCH_KERNELS


def require_reference(recording: str | Path | None, backend: str) -> None:
    """Raises MissingDependencyError where the reference would have to run, and cannot."""
    if recording is not None and backend != TORCH_KERNELS:
        return
    try:
        require_export_packages("verify")
    except MissingDependencyError as error:
        if recording is not None:
            raise
        raise MissingDependencyError(f"{error}; or judge by a file of `doge-deploy record` with --recording") from None

"""The process in which a library is loaded; `probe.py` starts one for each."""

from __future__ import annotations

import importlib
from typing import Any

from doge_deploy.process.worker import serve


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Import `module`, run `code` with it, and tell the version and what the code found."""
    module = importlib.import_module(request["module"])
    found: dict[str, Any] = {"version": str(getattr(module, "__version__", ""))}
    exec(request["code"], {"module": module, "found": found})
    return found


if __name__ == "__main__":
    serve(answer)

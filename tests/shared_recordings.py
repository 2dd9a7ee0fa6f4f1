"""Recordings for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import shared_files
from bundles import shared_bundle

from doge_deploy.verify.recording.record import record


def shared_recording(model: str | Path, *, greedy_steps: int = 24, **options: Any) -> Path:
    """A recording of `shared_bundle(model, **options)`, made once a session; do not write to it."""
    bundle = shared_bundle(model, **options)
    key = ["recording", shared_files.content(bundle), greedy_steps]
    reference = str(model) if isinstance(model, Path) else None

    def make(folder: Path) -> None:
        folder.mkdir()
        record(bundle, folder / "it.recording", reference=reference, greedy_steps=greedy_steps)

    name = f"{Path(model).name}-recording"
    return shared_files.made_once(name, key, make) / "it.recording"

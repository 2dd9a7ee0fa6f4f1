"""Sessions that take denormal numbers for zero."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle
from random_doge import SMALL, SMALL_MOE, save_random_doge

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.backend import open_backend
from doge_deploy.runtime.ort import open as runtime_open
from doge_deploy.runtime.ort import open_session

_RUN = """
import json, sys
from pathlib import Path
import numpy as np
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.backend import open_backend

path, flush, ids = sys.argv[1], json.loads(sys.argv[2]), np.array([json.loads(sys.argv[3])])
runner = open_backend(open_bundle(Path(path)), threads=2, flush_denormals=flush)
runner.reset()
logits = [runner.run(ids), runner.run(ids[:, :1])]
tiny = np.full(4, 1e-38, np.float32) * np.float32(0.1)
print(json.dumps([bool(tiny.any()), [call.ravel().tolist() for call in logits]]))
"""


def _bundle(folder: Path, window: int, **more: Any) -> Path:
    config = {**SMALL, **more, "head_dim": 16, "keep_window_size": window, "max_position_embeddings": 64}
    return make_bundle(save_random_doge(folder / "checkpoint", **config), folder / "bundle")


@pytest.mark.parametrize("more", [{}, SMALL_MOE], ids=["dense", "moe"])
def test_logits_are_the_same_without_denormal_numbers(tmp_path: Path, more: dict[str, Any]) -> None:
    bundle = _bundle(tmp_path, 64, **more)
    ids = np.random.default_rng(0).integers(3, SMALL["vocab_size"], 48).tolist()

    def run(flush: bool) -> tuple[bool, list[list[float]]]:
        """Whether the calling thread knows denormal numbers; logits. In a process whose first session it is."""
        command = [sys.executable, "-c", _RUN, str(bundle), json.dumps(flush), json.dumps(ids)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        known, logits = json.loads(done.stdout)
        return known, logits

    (known, as_they_are), (still_known, flushed) = run(False), run(True)
    assert known
    assert not still_known
    assert flushed == as_they_are


@pytest.mark.parametrize(("window", "flushed"), [(64, True), (8, False)])
def test_scores_that_decide_which_keys_stay_are_never_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, flushed: bool
) -> None:
    asked: list[bool] = []

    def record(*arguments: Any, flush_denormals: bool, **options: Any) -> Any:
        asked.append(flush_denormals)
        return open_session(*arguments, **options)  # this process keeps its denormal numbers

    monkeypatch.setattr(runtime_open, "open_session", record)
    open_backend(open_bundle(_bundle(tmp_path, window)), flush_denormals=True)
    assert asked == [flushed]

"""ONNX Runtime, as doge-deploy loads it, sends nothing to anybody and leaves no device id in the user's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

pytest.importorskip("onnxruntime")

SCRIPT = """
import json, os, sys
import doge_deploy
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"x": __import__("numpy").zeros(1, "float32")})
print(json.dumps([os.environ.get("ORT_DISABLE_TELEMETRY"), len(os.listdir("/proc/self/task"))]))
"""


def _run(folder: Path, **environment: str) -> list[object]:
    """The variable and the number of threads of a process that has used a session; its home is `folder / "home"`."""
    number = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [number], [result])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx")
    home = folder / "home"
    home.mkdir()
    # ONNX Runtime keeps silent under CI by itself, which must not be what makes this pass
    unwanted = ("CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "model.onnx")],
        env={**kept, "HOME": str(home), "OPENBLAS_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[object] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by the files of Linux")
def test_a_session_has_no_thread_that_sends_events_and_writes_no_file(tmp_path: Path) -> None:
    assert _run(tmp_path) == ["1", 1]
    assert not list((tmp_path / "home").rglob("*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by the files of Linux")
def test_who_has_set_the_variable_keeps_it(tmp_path: Path) -> None:
    assert _run(tmp_path, ORT_DISABLE_TELEMETRY="true")[0] == "true"

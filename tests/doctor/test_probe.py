"""Libraries that load, are missing, or are half installed: each is a finding, none ends the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from doge_deploy.doctor.probe import Found, probe_libraries, run_tool
from doge_deploy.targets.backend import Library

MODULES = {
    "fine": "__version__ = '1.2'\nthing = 3\n",
    "noisy": "print('hello')\n__version__ = '1.2'\nthing = 3\n",
    "no-version": "thing = 3\n",
    "lacks-its-native-part": "raise ImportError('libnvinfer.so.11: cannot open shared object file')\n",
    "older-than-we-think": "__version__ = '0.1'\n",
    "aborts": "import os\nos.abort()\n",
    "exits": "import sys\nsys.exit(7)\n",
    "ends-quietly": "import os\nos._exit(0)\n",
    "hangs": "import time\ntime.sleep(60)\n",
    "hangs-at-its-end": "import atexit, time\nthing = 3\natexit.register(time.sleep, 60)\n",
    "crashes-at-its-end": "import atexit, os\nthing = 3\natexit.register(os.abort)\n",
}

PROBLEMS = {
    "fine": "",
    "noisy": "",
    "no-version": "",
    "lacks-its-native-part": "ImportError: libnvinfer.so.11: cannot open shared object file",
    "older-than-we-think": "AttributeError: module 'pretend_vendor' has no attribute 'thing'",
    "aborts": "its process was ended by signal 6 (SIGABRT) when it is loaded",
    "exits": "its process ended with status 7 when it is loaded",
    "ends-quietly": "its process ended with status 0 when it is loaded",
    "hangs": "does not load within 2 s",
    "hangs-at-its-end": "its process did not end within",
    "crashes-at-its-end": "its process was ended by signal 6 (SIGABRT)",
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Library]:
    """Puts a module of a name that nothing else has where this process and its children find it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(text: str) -> Library:
        (tmp_path / "pretend_vendor.py").write_text(text, encoding="utf-8")
        return Library("pretend_vendor", "x", ("pretend-vendor",), "found['thing'] = module.thing")

    return write


@pytest.mark.parametrize("name", MODULES)
def test_a_library_in_any_state_is_a_finding(
    name: str, install: Callable[[str], Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout_s = 2.0 if name == "hangs" else 60.0
    if name == "hangs-at-its-end":  # by then its time is over
        times = iter([0.0, 0.0, timeout_s])
        monkeypatch.setattr("doge_deploy.doctor.probe.time", SimpleNamespace(monotonic=lambda: next(times)))
    found = probe_libraries({"x": install(MODULES[name])}, timeout_s)["x"]
    assert found.problem.startswith(PROBLEMS[name])
    assert found.works == (PROBLEMS[name] == "")
    if found.works:
        assert found.details == {"thing": 3}
        assert found.version == ("unknown" if name == "no-version" else "1.2")


def test_what_is_not_there_has_no_version() -> None:
    libraries = {
        "a": Library("no_such_module_here", "x", ("x",), "module"),
        "b": Library("no_such.module", "x", ("x",), "module"),
    }
    assert probe_libraries(libraries) == {"a": Found(None), "b": Found(None)}


def test_a_library_without_code_is_not_loaded(install: Callable[[str], Library]) -> None:
    install(MODULES["aborts"])
    assert probe_libraries({"x": Library("pretend_vendor", "x", ("pytest",))})["x"].version == pytest.__version__


def test_a_file_in_the_current_directory_is_not_taken_for_a_library(
    install: Callable[[str], Library], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = install(MODULES["fine"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pretend_vendor.py").write_text("raise RuntimeError('the wrong file')\n", encoding="utf-8")
    monkeypatch.chdir(elsewhere)
    assert probe_libraries({"x": library})["x"].works


def test_a_tool_that_is_missing_or_fails_says_nothing() -> None:
    assert run_tool(["no-such-tool-here"]) is None
    assert run_tool(["false"]) is None
    assert run_tool(["sleep", "9"], timeout_s=0.1) is None
    assert run_tool(["echo", "yes"]) == "yes\n"


def test_a_module_that_several_packages_bring_is_there_with_its_own_package() -> None:
    """The module `onnxruntime` is here, and not of `onnxruntime-gpu`."""
    own = Library("onnxruntime", "cpu", distributions=("onnxruntime",))
    other = Library("onnxruntime", "gpu", distributions=("onnxruntime-gpu",), shares_module=True)
    found = probe_libraries({library.key: library for library in (own, other)})
    assert found["onnxruntime"].version is not None and found["onnxruntime-gpu"].version is None

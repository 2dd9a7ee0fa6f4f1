"""A bundle that is opened in pieces at the same time, beside one that is opened piece after piece."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from bundles import own_bundle

from doge_deploy.bundle import file_check
from doge_deploy.bundle.files import file_entry
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import BrokenBundleError, DogeDeployError
from doge_deploy.runtime import text_model
from doge_deploy.runtime.backend import open_backend
from doge_deploy.runtime.ort.graph_cache import VARIABLE
from doge_deploy.runtime.text_model import TextModel
from doge_deploy.text.tokenizer import Tokenizer

Change = Callable[[Path], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Also, every file is hashed by the thread, as a large one is."""
    monkeypatch.setattr(file_check, "AT_ONCE_BYTES", 0)
    folder = tmp_path / "cache"
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return own_bundle(tmp_path / "bundle", "doge-tiny")


def altered(name: str) -> Change:
    """The last byte of a file, which then has the size and the time that it had."""

    def change(path: Path) -> None:
        file = path / name
        times = file.stat()
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    return change


def without(name: str) -> Change:
    return lambda path: (path / name).unlink()


def holding(name: str, content: bytes) -> Change:
    """A file that holds something else, as the manifest says too."""

    def change(path: Path) -> None:
        (path / name).write_bytes(content)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = dict(file_entry(path / name))
        (path / "manifest.json").write_text(json.dumps(manifest))

    return change


GRAPH, TOKENIZER, WEIGHTS = "model.ort.onnx", "tokenizer.json", "weights.safetensors"

WRONG: dict[str, tuple[list[Change], dict[str, Any]]] = {
    "nothing": ([], {}),
    "weights": ([altered(WEIGHTS)], {}),
    "graph": ([altered(GRAPH)], {}),
    "tokenizer": ([altered(TOKENIZER)], {}),
    "missing": ([without("model.onnx"), altered(WEIGHTS)], {}),
    "no tokenizer": ([holding(TOKENIZER, b"{}")], {}),
    "no graph": ([holding(GRAPH, b"no graph")], {}),
    "neither": ([holding(TOKENIZER, b"{}"), holding(GRAPH, b"no graph")], {}),
    "no graph, weights": ([holding(GRAPH, b"no graph"), altered(WEIGHTS)], {}),
    "no tokenizer, weights": ([holding(TOKENIZER, b"{}"), altered(WEIGHTS)], {}),
    "settings": ([holding("generation_config.json", b'{"temperature": "hot"}'), holding(GRAPH, b"no graph")], {}),
    "no settings": ([holding("generation_config.json", b"[]")], {}),
    "layout": ([], {"layout": "paged"}),
    "layout that it has not": ([], {"layout": "growing"}),
    "layout, weights": ([altered(WEIGHTS)], {"layout": "paged"}),
    "engine": ([], {"engine": "none"}),
    "backend": ([holding(TOKENIZER, b"{}")], {"backend": "nobody"}),
    "choice": ([holding(GRAPH, b"no graph")], {"defaults": {"top_p": 3, "do_sample": True}}),
}
"""What is done to a bundle, and what is asked of it."""


def said(path: Path, prompt: str = "import", **options: Any) -> str:
    """A text, or the error in whose place there is none."""
    try:
        with TextModel(path, threads=1, **options) as model:
            return model.generate(prompt, max_new_tokens=4, do_sample=False).text
    except DogeDeployError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_same_is_said(wrong: str, warm: bool, path: Path, cache: Path, tmp_path: Path) -> None:
    changes, options = WRONG[wrong]
    if warm:
        said(path)
        assert list(cache.glob("*/entry.json"))
    for change in changes:
        change(path)
    expected = said(path, **options, graph_cache=False)
    assert said(path, **options, at_once=True) == expected
    assert said(path, "a " * 2000, **options, at_once=True) == said(path, "a " * 2000, **options)
    assert ("Error: " in expected) == (wrong != "nothing")
    if altered(WEIGHTS) in changes or wrong == "weights":
        assert "weights.safetensors was altered" in expected


def test_no_entry_is_made_of_weights_that_are_not_proved(path: Path, cache: Path) -> None:
    """It would be taken for that of the true weights once these are back."""
    altered(WEIGHTS)(path)
    assert "was altered" in said(path, at_once=True)
    with pytest.raises(BrokenBundleError):
        open_backend(open_bundle(path, wait=False), threads=1)
    assert not list(cache.glob("*")) and not list(cache.glob(".*"))
    altered(WEIGHTS)(path)
    assert said(path, at_once=True) == said(path, graph_cache=False)
    assert list(cache.glob("*/entry.json"))


class _Sessions:
    """Takes the place of ONNX Runtime's class: notes in which thread sessions are made, and can hold them up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[threading.Thread] = []
        self.before: Callable[[], object] = lambda: None
        self.read: Callable[[], object] = lambda: None
        original = onnxruntime.InferenceSession

        def make(*arguments: Any, disabled_optimizers: Any = (), **options: Any) -> Any:
            self.threads.append(threading.current_thread())
            self.before()
            names = set(disabled_optimizers)
            assert not names
            self.read()
            return original(*arguments, **options)

        monkeypatch.setattr(onnxruntime, "InferenceSession", make)


@pytest.fixture
def sessions(path: Path, monkeypatch: pytest.MonkeyPatch) -> _Sessions:
    said(path)  # makes the entry of the cache
    return _Sessions(monkeypatch)


def test_the_tokenizer_is_read_while_the_session_is_made(
    path: Path, sessions: _Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other: done one after the other they would wait forever. Not before the graph is read: then
    ONNX Runtime would have to wait for the interpreter.
    """
    begun, threads = threading.Event(), []
    original = Tokenizer.from_directory

    def read(*arguments: Any, **options: Any) -> Tokenizer:
        threads.append(threading.current_thread())
        begun.set()
        return original(*arguments, **options)

    def not_yet() -> None:
        assert not begun.wait(0.3)

    monkeypatch.setattr(Tokenizer, "from_directory", read)
    sessions.before = not_yet
    sessions.read = lambda: begun.wait(60) or pytest.fail("the tokenizer is not being read")
    with TextModel(path, threads=1, at_once=True) as model:
        assert model.generate("import", max_new_tokens=2).text
    here = threading.current_thread()
    assert sessions.threads == [here], "how it treats denormal numbers is set in the thread that computes"
    assert len(threads) == 1 and threads[0] is not here


def test_one_after_the_other(path: Path, sessions: _Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference implementation, and models so large that nobody should wait for them who gave a wrong prompt."""
    for options in ({}, {"at_once": True}):
        monkeypatch.setattr(text_model, "AT_ONCE_BYTES", 1000)
        model = TextModel(path, threads=1, **options)
        assert not sessions.threads
        model.open()
        assert len(sessions.threads) == 1
        sessions.threads.clear()


def test_a_session_is_made_while_weights_are_hashed(
    path: Path, sessions: _Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody gets it before they are."""
    made, original = threading.Event(), file_check.hash_problem
    sessions.read = made.set

    def held(directory: Path, name: str, *arguments: Any) -> str | None:
        if directory == path and name == WEIGHTS:
            assert made.wait(60)
            return "weights.safetensors is not what it was"
        return original(directory, name, *arguments)

    monkeypatch.setattr(file_check, "hash_problem", held)
    with pytest.raises(BrokenBundleError, match="is not what it was"):
        open_backend(open_bundle(path, check="quick", wait=False), threads=1)
    assert made.is_set()
    made.clear()
    with pytest.raises(BrokenBundleError, match="is not what it was"):
        TextModel(path, threads=1, at_once=True)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_disk_that_cannot_be_read(
    at_once: bool, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from doge_deploy.bundle import files

    original = files.sha256_file

    def failing(file: Path, *piece: int) -> str:
        if file.name == WEIGHTS:
            raise OSError(5, "Input/output error", str(file))
        return original(file, *piece)

    monkeypatch.setattr(files, "sha256_file", failing)
    if not at_once:
        monkeypatch.setattr(file_check, "AT_ONCE_BYTES", 1 << 30)
    code = run_command(["generate", str(path), "--prompt", "a", "--max-new-tokens", "1"])
    message = capsys.readouterr().err
    assert code == 4 and message.count("\n") == 1 and "Input/output error" in message and WEIGHTS in message


ENDLESS = f"""
import sys, time
from doge_deploy.bundle import file_check
from doge_deploy.cli.main import main
file_check.AT_ONCE_BYTES = 0
original = file_check.hash_problem
def endless(directory, name, *arguments):
    if name == "{WEIGHTS}":
        print("hashing", flush=True)
        time.sleep(600)
    return original(directory, name, *arguments)
file_check.hash_problem = endless
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_while_a_thread_hashes(number: int, code: int, path: Path) -> None:
    said(path)  # so that the session is made from the cache
    command = [sys.executable, "-c", ENDLESS, "generate", path, "--prompt", "a"]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "hashing\n"
        time.sleep(1)
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stdout.read() == ""
        assert "Traceback" not in process.stderr.read()

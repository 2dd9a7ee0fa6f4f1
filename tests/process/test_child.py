"""Child processes that crash, are killed, hang, print what they like, or outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from doge_deploy.errors import BrokenBundleError, DogeDeployError, UsageError
from doge_deploy.process import child as child_module
from doge_deploy.process.child import Child, ChildError, ChildTimeoutError
from doge_deploy.process.worker import error_message

SERVE = "from doge_deploy.process.worker import serve, connect\n"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def serving(body: str) -> Child:
    """A child that answers each request by the function body `body`."""
    lines = "\n".join("    " + line for line in body.splitlines())
    return Child(python(f"{SERVE}import os, sys, time\ndef answer(request):\n{lines}\nserve(answer)\n"))


def test_requests_are_answered_in_order() -> None:
    with serving("return {'twice': 2 * request['x']}") as child:
        assert [child.ask({"x": x})["twice"] for x in range(50)] == [2 * x for x in range(50)]
        child.finish()


def test_a_large_message_passes_both_ways_at_once() -> None:
    """Neither end waits for the other to read first."""
    with serving("return {'text': request['text'] * 2}") as child:
        child.send({"text": "x" * 3_000_000})
        child.send({"text": "y" * 3_000_000})
        assert [len(message["text"]) for message in (child.receive(), child.receive()) if message] == [6_000_000] * 2


def test_what_libraries_print_does_not_get_among_the_answers() -> None:
    with serving("print('hello')\nos.system('echo from another program')\nreturn {'x': 1}") as child:
        assert child.ask({}) == {"x": 1}


def test_where_no_folder_can_be_written_only_the_log_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(child_module.tempfile, "TemporaryFile", refused)
    with serving("if request: return {'x': 1}\nraise SystemExit(3)") as child:
        assert child.running and child.ask({"go": 1}) == {"x": 1}
        with pytest.raises(ChildError, match="ended with status 3; its log is empty"):
            child.ask({})
        assert not child.running


@pytest.mark.parametrize(("kind", "message"), [(UsageError, "no"), (BrokenBundleError, "it is broken")])
def test_an_error_of_ours_keeps_its_class_and_its_line(kind: type[DogeDeployError], message: str) -> None:
    body = f"from doge_deploy.errors import {kind.__name__}\nraise {kind.__name__}({message!r})"
    with serving(body) as child:
        for _ in range(2):  # the child goes on
            with pytest.raises(kind) as caught:
                child.ask({})
            assert type(caught.value) is kind
            assert str(caught.value) == message


def test_an_error_that_the_parent_does_not_know_comes_as_the_nearest_that_it_does() -> None:
    class Own(UsageError):
        pass

    assert error_message(Own("x")) == {"error": "UsageError", "message": "x"}


CRASHES = {
    "abort": ("import os, sys; print('the cause', file=sys.stderr, flush=True); os.abort()", r"signal 6 \(SIGABRT\)"),
    "segmentation-fault": ("import ctypes; ctypes.string_at(0)", r"was ended by signal 11 \(SIGSEGV\)"),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"was ended by signal 9 \(SIGKILL\)"),
    "traceback": ("raise KeyError('the cause')", r"ended with status 1; its log ends with: .*KeyError: 'the cause'"),
    "exit": ("import sys; sys.exit('the cause')", r"ended with status 1; its log ends with: the cause"),
    "silence": ("", r"ended with status 0; its log is empty"),
}


@pytest.mark.parametrize(("code", "words"), CRASHES.values(), ids=CRASHES.keys())
def test_a_crash_is_one_line(code: str, words: str) -> None:
    with Child(python(code)) as child, pytest.raises(ChildError, match=words) as caught:
        child.ask({})
    assert "\n" not in str(caught.value)


def test_the_end_of_a_long_log_is_what_is_quoted() -> None:
    code = (
        "import os, sys\nfor i in range(100_000): print('line', i, file=sys.stderr)\n"
        "print('x' * 1000, file=sys.stderr)\nprint('the cause', file=sys.stderr)\nsys.stderr.flush()\nos.abort()"
    )
    with Child(python(code)) as child:
        child.send({})
        assert child.receive() is None
        found = child.failure()
    assert found.log == ("line 99999", "x" * 300, "the cause")


GARBAGE = {"text": "hello", "array": "[1, 2]", "number": "3", "half": '{"x": ', "bytes": "\\x00\\xff"}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_an_error_that_quotes_it(text: str) -> None:
    code = f"import sys, time\nsys.stdout.buffer.write(b'{text}\\n')\nsys.stdout.flush()\ntime.sleep(60)"
    with Child(python(code)) as child, pytest.raises(ChildError, match="which is not a JSON object"):
        child.ask({})
    assert child._process.returncode is not None


def test_a_child_that_hangs_is_ended() -> None:
    with serving("time.sleep(60)") as child, pytest.raises(ChildTimeoutError, match=r"did not answer within 1 s"):
        child.ask({}, timeout_s=1.0)
    assert child._process.returncode == -signal.SIGKILL


AT_ITS_END = "import atexit\natexit.register(time.sleep, 60)\nreturn {}"


def test_a_child_that_hangs_at_its_end_is_ended() -> None:
    with serving(AT_ITS_END) as child:
        child.ask({})
        with pytest.raises(ChildTimeoutError, match="did not end within 1 s of its last answer"):
            child.finish(1.0)
    assert child._process.returncode == -signal.SIGKILL


def test_a_child_that_hangs_at_its_end_does_not_keep_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "GRACE_S", 0.5)
    with serving(AT_ITS_END) as child:
        child.ask({})
    assert child._process.returncode == -signal.SIGKILL


def test_a_crash_at_the_end_is_seen() -> None:
    with serving("import atexit\natexit.register(os.abort)\nreturn {}") as child:
        child.ask({})
        with pytest.raises(ChildError, match="SIGABRT"):
            child.finish()


def test_an_error_in_the_parent_ends_the_child_at_once() -> None:
    with pytest.raises(ZeroDivisionError), serving("time.sleep(60)") as child:
        child.send({})
        raise ZeroDivisionError
    assert child._process.returncode == -signal.SIGKILL


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(ChildError, match="cannot be started: No such file"):
        Child(["/no/such/program"])


def test_an_interrupt_of_the_terminal_leaves_the_decision_to_the_parent() -> None:
    with serving("return {}") as child:
        child.ask({})
        os.kill(child.pid, signal.SIGINT)
        assert child.ask({}) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's PR_SET_PDEATHSIG")
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    worker = f"{SERVE}import time\nserve(lambda request: time.sleep(60))"
    parent = (
        "import pathlib, sys, time\nfrom doge_deploy.process.child import Child\n"
        f"child = Child([sys.executable, '-c', {worker!r}])\nchild.send({{}})\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\ntime.sleep(60)"
    )
    process = subprocess.Popen(python(parent))
    try:
        assert wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        pid = int((tmp_path / "pid").read_text())
        assert wait_for(lambda: "serve" in command_of(pid))
        time.sleep(1.0)  # it has to get as far as asking for the signal
    finally:
        process.kill()
        process.wait()
    assert wait_for(lambda: not command_of(pid))


def command_of(pid: int) -> str:
    """The command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def wait_for(condition: Callable[[], bool]) -> bool:
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.1)
    return False

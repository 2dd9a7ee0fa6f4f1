"""Errors that nobody raises on purpose: one line and a code that is never 1, whatever a library or the system does."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import click
import pytest

from doge_deploy.cli import commands
from doge_deploy.cli.endings import ending
from doge_deploy.cli.main import run_command
from doge_deploy.errors import BrokenBundleError, DogeDeployError, MismatchError


class LibraryError(Exception):
    """Of a class that a library brings along."""


LibraryError.__module__ = "somelibrary.native"

KINDS: dict[str, tuple[BaseException, int, str]] = {
    "mismatch": (MismatchError("two numbers differ"), 1, "two numbers differ"),
    "broken bundle": (BrokenBundleError("altered"), 3, "altered"),
    "disk full": (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "a/b: No space left on device"),
    "disk full, no file": (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device (--debug"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), 2, "a: Disk quota exceeded"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "a: Permission denied"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "a"), 2, "a: Read-only"),
    "vanished": (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), 2, "a: No such file"),
    "rename": (OSError(errno.ENOTEMPTY, "Directory not empty", "a", None, "b"), 2, "a -> b: Directory not empty"),
    "broken disk": (OSError(errno.EIO, "Input/output error", "a"), 4, "a: Input/output error"),
    "too many files": (OSError(errno.EMFILE, "Too many open files", "a"), 4, "a: Too many open files"),
    "timeout": (TimeoutError(errno.ETIMEDOUT, "timed out"), 4, "timed out"),
    "a library's OSError": (OSError("does not appear to have a file named config.json"), 3, "does not appear"),
    "memory": (MemoryError(), 4, "out of memory"),
    "memory, torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 4, "out of memory: Default"),
    "memory, C++": (LibraryError("std::bad_alloc"), 4, "out of memory: std::bad_alloc"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), 3, "nested too deeply: maximum"),
    "import": (ImportError("libcudart.so.13: cannot open shared object file"), 4, "libcudart.so.13"),
    "a library": (LibraryError("[E] node 7 is\nnot known"), 3, "LibraryError: [E] node 7 is not known (--debug"),
    "RuntimeError": (RuntimeError("shape mismatch"), 3, "RuntimeError: shape mismatch"),
    "bare Exception": (Exception("while deserializing"), 3, "Exception: while deserializing"),
    "a fault of ours": (KeyError("layer"), 70, "unexpected KeyError: 'layer' (--debug shows where; please report it)"),
    "an assertion": (AssertionError("never"), 70, "unexpected AssertionError: never"),
    "end of input": (EOFError("read past the end"), 70, "unexpected EOFError"),
    "a library that exits": (SystemExit(1), 70, "a library ended the command: 1"),
    "a library that exits with words": (SystemExit("no license"), 70, "no license"),
    "a file of click": (click.FileError("a", "denied"), 2, "Could not open file 'a': denied"),
    "a base error": (DogeDeployError("which"), 70, "which"),
}


@pytest.mark.parametrize(("error", "code", "words"), KINDS.values(), ids=KINDS.keys())
def test_an_error_is_one_line_and_a_code(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def run(_args: list[str]) -> int:
        raise error

    monkeypatch.setattr(commands, "run", run)
    assert run_command(["inspect", "x"]) == code
    said = capfd.readouterr().err
    assert said.startswith("doge-deploy: error: ") and said.count("\n") == 1 and words in said
    assert (code == 1) == isinstance(error, MismatchError)


def test_debug_shows_the_traceback_of_any_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(_args: list[str]) -> int:
        raise KeyError("layer")

    monkeypatch.setattr(commands, "run", run)
    assert run_command(["inspect", "x"], debug=True) == 70
    assert "Traceback" in capfd.readouterr().err


def test_rich_makes_an_exit_of_a_reader_that_went_away() -> None:
    try:
        try:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 (as rich does)
    except SystemExit as error:
        assert ending(error) == (141, "")


def started(command: str, **streams: object) -> subprocess.Popen[bytes]:
    """`main()` in a process of its own, after the Python lines of `command`."""
    code = f"{textwrap.dedent(command)}\nfrom doge_deploy.cli.main import main\nmain()"
    args = [sys.executable, "-c", code, *streams.pop("args", ())]  # type: ignore[call-overload]
    return subprocess.Popen(args, **streams)  # type: ignore[call-overload, no-any-return]


TALKING = {
    "help": ["--help"],
    "version": ["--version"],
    "help of a command": ["export", "--help"],
    "inspect": ["inspect", "BUNDLE"],
    "doctor": ["doctor", "--target", "jetson"],
    "plugins": ["plugins", "list"],
}
"""Commands that write to standard output, and need neither torch nor much time."""


@pytest.mark.parametrize("arguments", TALKING.values(), ids=TALKING.keys())
def test_a_reader_that_goes_away_is_141(arguments: list[str], tiny_bundle: Path) -> None:
    args = [str(tiny_bundle) if word == "BUNDLE" else word for word in arguments]
    reading, writing = os.pipe()
    os.close(reading)
    with started("", args=args, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize("arguments", TALKING.values(), ids=TALKING.keys())
def test_an_output_that_cannot_be_written_is_2(arguments: list[str], tiny_bundle: Path) -> None:
    args = [str(tiny_bundle) if word == "BUNDLE" else word for word in arguments]
    with (
        open("/dev/full", "wb") as full,
        started("", args=args, stdout=full, stderr=subprocess.PIPE) as process,
    ):
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == 2
    assert said.count("\n") == 1 and "No space left on device" in said


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "nowhere"]], ids=["good", "bad"])
def test_closed_streams_are_dev_null(closed: str, arguments: list[str]) -> None:
    closing = " ".join(f"{number}>&-" for number in closed.split())
    code = "from doge_deploy.cli.main import main; main()"
    result = subprocess.run(
        ["bash", "-c", f'exec "$@" {closing}', "bash", sys.executable, "-c", code, *arguments], capture_output=True
    )
    assert result.returncode == (0 if arguments == ["--version"] else 2)
    assert b"Traceback" not in result.stderr


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import os\nfrom doge_deploy.cli.streams import open_closed_streams\nopen_closed_streams()\n"
        f"file = open({str(tmp_path / 'f')!r}, 'w')\nassert file.fileno() > 2\nos.write(1, b'a library')"
    )
    result = subprocess.run(["bash", "-c", 'exec "$@" 1>&-', "bash", sys.executable, "-c", code], capture_output=True)
    assert (result.returncode, (tmp_path / "f").read_bytes()) == (0, b"")


INTERRUPT_AT = """
import sys
class Interrupting:
    # Ctrl-C while the module of that name is imported
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
"""

IMPORTED = [
    "doge_deploy.cli.streams",
    "doge_deploy.cli.commands",
    "click",
    "click.core",
    "doge_deploy.cli.inspect",
    "doge_deploy.bundle.manifest",
    "json",
    "rich",
]


@pytest.mark.parametrize("name", IMPORTED)
def test_ctrl_c_during_an_import_is_130(name: str, tiny_bundle: Path) -> None:
    script = INTERRUPT_AT.format(name=name)
    with started(script, args=["inspect", str(tiny_bundle)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, said = process.communicate()
    if name != "json" and name != "rich":  # whether those two are imported is not promised
        assert process.returncode == 130
    assert process.returncode in (0, 130)
    assert b"Traceback" not in said and b"KeyboardInterrupt" not in said


@pytest.mark.parametrize("times", [1, 3], ids=["once", "in a row"])
def test_ctrl_c_at_work_is_130(times: int) -> None:
    script = """
    from doge_deploy.cli import commands
    def run(args):
        import time
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.5)
            print("tidied", flush=True)
    commands.run = run
    """
    with started(script, args=["inspect", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        out, said = process.communicate()
    assert (process.returncode, out, said) == (130, b"tidied\n", b"\ndoge-deploy: interrupted\n")


def test_ctrl_c_that_a_library_turns_into_another_error_is_130() -> None:
    script = """
    from doge_deploy.cli import commands
    def run(args):
        import time
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            raise SystemError("initialization failed")
    commands.run = run
    """
    with started(script, args=["inspect", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130


def test_sigterm_is_143_and_says_nothing() -> None:
    script = """
    from doge_deploy.cli import commands
    def run(args):
        import time
        print("ready", flush=True)
        time.sleep(60)
    commands.run = run
    """
    with started(script, args=["inspect", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.communicate() == (b"", b"")
    assert process.returncode == 143


def test_an_interrupt_within_code_from_a_string_ends_with_130_as_any_other(tmp_path: Path) -> None:
    """CPython remembers such an interrupt, and would end `python -m` by the signal although it was handled."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "import doge_deploy.cli.main as main\n"
        "def run_command(args, debug=False):\n"
        "    try:\n"
        "        exec('raise KeyboardInterrupt')\n"
        "    except KeyboardInterrupt:\n"
        "        return 130\n"
        "main.run_command = run_command\n"
        "main.main()\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "interrupted"]
    assert subprocess.run(command, cwd=tmp_path, timeout=60).returncode == 130

"""What a kind of hard input is: a list of cases, each of which says how the tool took its input.

A module `kind_*.py` beside this one holds `KIND`, its name in the table, and `cases()`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import doge_deploy

DEMO = Path(doge_deploy.__file__).parent / "demo" / "doge-tiny"

Verdict = Literal["right", "refused", "wrong"]


@dataclass(frozen=True)
class Outcome:
    """How an input was taken."""

    verdict: Verdict
    """`right`: the answer is that of transformers, or what the documentation promises; `refused`: one line that
    names the culprit, with the documented exit code; `wrong`: anything else."""
    says: str = ""
    """The line of a refusal, or what is wrong."""


@dataclass(frozen=True)
class Case:
    """One input."""

    name: str
    run: Callable[[Path], Outcome]
    """Called with an empty folder of its own."""
    sweep: bool = False
    """One of many of its like: the suite tries it in the full run only. The table has all."""


def right(says: str = "") -> Outcome:
    return Outcome("right", says)


def refused(says: str) -> Outcome:
    return Outcome("refused", says)


def wrong(says: str) -> Outcome:
    return Outcome("wrong", says)


def equal(found: object, expected: object) -> Outcome:
    return right() if found == expected else wrong(f"{found!r} instead of {expected!r}"[:300])


@dataclass(frozen=True)
class Ended:
    """What a command left."""

    code: int
    output: str
    errors: str

    @property
    def last_line(self) -> str:
        return self.errors.rstrip("\n").rpartition("\n")[2]

    def refusal(self, code: int, *names: str) -> Outcome:
        """`refused` where the command ended with `code` and one error line that holds all of `names`."""
        line = self.last_line
        if self.code != code:
            return wrong(f"exit {self.code} instead of {code}: {line}")
        if self.errors.count("doge-deploy: error:") != 1 or "Traceback" in self.errors or not line.startswith("doge-"):
            return wrong(f"not one line: {self.errors[-300:]!r}")
        missing = [name for name in names if name not in line]
        return wrong(f"{missing[0]!r} is not in {line!r}") if missing else refused(line)


def command(*arguments: object, stdin: bytes = b"") -> Ended:
    """Run `doge-deploy ARGUMENTS` in this process."""
    from doge_deploy.cli.main import run_command

    output, errors = _Text(), _Text()
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    sys.stdout, sys.stderr = output, errors
    try:
        code: Any = run_command([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    except BaseException:  # what escapes is a finding, not an end of the table
        traceback.print_exc()
        code = "traceback"
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
    return Ended(code, output.written(), errors.written())


class _Text(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def written(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode()


def demo_copy(folder: Path, **changed: Callable[[Any], Any]) -> Path:
    """A copy of doge-tiny to be changed, `folder`/checkpoint; `changed` edits JSON files named without `.json`."""
    target = folder / "checkpoint"
    shutil.copytree(DEMO, target)
    for path in target.iterdir():
        path.chmod(0o644)
    for name, edit in changed.items():
        file = target / f"{name}.json"
        document = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        result = edit(document)
        file.write_text(json.dumps(document if result is None else result), encoding="utf-8")
    return target


def kinds() -> list[ModuleType]:
    """Every module of a kind, in the order of their names."""
    with _importable():
        names = sorted(path.stem for path in Path(__file__).parent.glob("kind_*.py"))
        return [importlib.import_module(f"hard_inputs.{name}") for name in names]


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """The folder of the tests is where helpers are imported from, as under pytest."""
    tests = str(Path(__file__).parent.parent)
    if tests not in sys.path:
        sys.path.insert(0, tests)
    yield


def try_case(case: Case, folder: Path) -> Outcome:
    """Run a case; an exception is a wrong outcome."""
    folder.mkdir(parents=True)
    try:
        return case.run(folder)
    except Exception as error:
        return wrong(f"{type(error).__name__}: {error}")

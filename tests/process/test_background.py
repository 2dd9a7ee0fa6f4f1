"""One thing in a thread of its own."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from doge_deploy.process.background import InBackground


def test_it_goes_on_meanwhile() -> None:
    go = threading.Event()
    work = InBackground(lambda: go.wait(60), "test")  # in this thread it would wait for what comes only after it
    go.set()
    assert work.result() is True
    assert work.result() is True, "it can be asked for again"


def test_nothing_is_a_result() -> None:
    assert InBackground(lambda: None, "test").result() is None


@pytest.mark.parametrize("error", [ValueError("a"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_what_it_raises_is_raised_where_it_is_asked_for(error: BaseException) -> None:
    def fail() -> None:
        raise error

    work = InBackground(fail, "test")
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            work.result()
        assert caught.value is error


def test_the_end_of_a_process_does_not_wait_for_abandoned_work() -> None:
    script = (
        "import time\nfrom doge_deploy.process.background import InBackground\n"
        "InBackground(lambda: time.sleep(600), 'test', abandoned_at_exit=True)\nprint('end')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout == "end\n" and not ended.stderr

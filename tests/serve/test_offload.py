"""Long work in threads leaves one of them for short work."""

from __future__ import annotations

import asyncio
import threading

import pytest

from doge_deploy.serve.http.offload import LONG, Offload


def test_short_work_does_not_wait_for_long_work_which_is_done_one_by_one() -> None:
    begun, go = [], threading.Event()

    def long(name: str) -> str:
        begun.append(name)
        assert go.wait(30)
        return name

    async def main() -> None:
        offload = Offload()
        waiting = [asyncio.ensure_future(offload(lambda name=name: long(name), LONG)) for name in "abcd"]  # type: ignore[misc]
        for _ in range(20):
            assert await asyncio.wait_for(offload(lambda: "short", LONG - 1), 30) == "short"
        assert begun == ["a"]
        go.set()
        assert await asyncio.gather(*waiting) == begun == list("abcd")
        offload.stop()

    asyncio.run(main())


def test_long_work_goes_on_after_some_that_failed() -> None:
    def fail() -> None:
        raise ValueError("no")

    async def main() -> None:
        offload = Offload()
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await offload(fail, LONG)
        assert await offload(lambda: 1, LONG) == 1
        offload.stop()

    asyncio.run(main())

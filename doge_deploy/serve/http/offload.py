"""What takes long is done in threads: a long prompt must not hold up the streams of others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")

LONG = 65_536
"""Characters or tokens from which on work is long: so many characters become tokens in some 30 ms, with 10 MB of memory
meanwhile."""


class Offload:
    """Runs work in two threads, of which long work has one: who brings little does not wait for those who bring much,
    and the memory that encoding takes is that of one long text, however many are sent.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2, "doge-tokenizer")
        self._long = asyncio.Lock()

    async def __call__(self, work: Callable[[], _Result], size: int = 0) -> _Result:
        """What `work` gives or raises.

        Args:
            work: to be done.
            size: characters or tokens that it works on.
        """
        if size < LONG:
            return await self._run(work)
        async with self._long:
            return await self._run(work)

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def stop(self) -> None:
        """Take nothing more; what has not begun is cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)

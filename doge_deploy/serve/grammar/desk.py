"""Where requests get their grammars: tried in another process, compiled in a thread of its own, and remembered."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter

from doge_deploy.errors import UsageError
from doge_deploy.serve.engine import EngineStoppedError
from doge_deploy.serve.grammar.compiler import Grammar, GrammarCompiler
from doge_deploy.serve.grammar.matchers import Kind, Source, source_text
from doge_deploy.serve.grammar.trial import Trial
from doge_deploy.serve.scheduler import QueueFullError

WAIT_SECONDS = 10.0
"""After so long a request whose turn comes is refused: others that take long are before it, and more come."""

STACK_BYTES = 8 * 2**20
"""Of the thread that compiles. Copies of a compiled grammar are followed with less than 128 KiB, in any thread."""

REMEMBERED = 16
"""Grammars, and refusals of grammars. Copies of a grammar share most of its memory with it."""

REMEMBERED_CHARACTERS = 256 * 1024
"""Of what they were made of."""


class GrammarDesk:
    """Compiles grammars that anybody may send. No other request waits for one, but for another new grammar.

    Args:
        compiler: makes the compiler of this process; called when the first grammar is wanted.
        trial: compiles each grammar first.
    """

    def __init__(self, compiler: Callable[[], GrammarCompiler], trial: Trial) -> None:
        self._compiler, self._trial = compiler, trial
        self._pool = ThreadPoolExecutor(1, "doge-grammar")
        self._known = _Remembered()
        self._closed = False

    async def compile(self, kind: Kind, source: Source = None) -> Grammar:
        """A grammar at its beginning; the same one for the same source: follow copies of it.

        Raises:
            UsageError: it cannot be used; why, without its name.
            QueueFullError: those before it take too long.
            EngineStoppedError: the server ends.
            DogeDeployError: the tokenizer or the other process cannot be used.
        """
        text = source_text(source)
        found = self._known.get(kind, text)
        if found is None:
            if self._closed:
                raise EngineStoppedError("the server is shutting down")
            found = await asyncio.wrap_future(self._submit(kind, text, perf_counter()))
        if isinstance(found, str):
            raise UsageError(found)
        return found

    def close(self) -> None:
        """End the other process and, after what it compiles, the thread."""
        self._closed = True
        self._trial.close()
        self._pool.shutdown(wait=False)

    def _submit(self, kind: Kind, text: str, asked: float) -> Future[Grammar | str]:
        before = threading.stack_size(STACK_BYTES)
        try:
            return self._pool.submit(self._work, kind, text, asked)
        finally:
            threading.stack_size(before)

    def _work(self, kind: Kind, text: str, asked: float) -> Grammar | str:
        """The grammar, or why there is none."""
        found = self._known.get(kind, text)  # another request wanted it meanwhile
        if found is None:
            if perf_counter() - asked > WAIT_SECONDS:
                raise QueueFullError(f"this grammar has waited for {WAIT_SECONDS:g} s for others to be compiled")
            try:
                self._trial.compile(kind, text)
                found = self._compiler().compile(kind, text)
            except UsageError as error:
                found = str(error)
            self._known.put(kind, text, found)
        return found


class _Remembered:
    """What came of the last grammars; used by several threads."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[Kind, str], Grammar | str] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def get(self, kind: Kind, text: str) -> Grammar | str | None:
        with self._lock:
            found = self._found.get((kind, text))
            if found is not None:
                self._found.move_to_end((kind, text))
            return found

    def put(self, kind: Kind, text: str, found: Grammar | str) -> None:
        with self._lock:
            self._found[kind, text] = found
            self._characters += len(text)
            while len(self._found) > REMEMBERED or self._characters > REMEMBERED_CHARACTERS:
                (_, oldest), _ = self._found.popitem(last=False)
                self._characters -= len(oldest)

"""Whether a grammar can be compiled, found out by a process of its own.

llguidance compiles some short grammars for hours, and others until the stack of a thread overflows, which ends the
process. Nothing can stop it from inside.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection
from pathlib import Path

from doge_deploy.errors import DogeDeployError, UsageError
from doge_deploy.process.child import Child, ChildError, ChildTimeoutError, worker_command
from doge_deploy.serve.engine import EngineStoppedError
from doge_deploy.serve.grammar.matchers import Kind

COMPILE_SECONDS = 2.0
"""A schema of 60 kB takes 0.05 s on a desktop processor."""

START_SECONDS = 60.0
"""For Python, llguidance and the tokenizer: a fraction of a second where nothing else runs."""

_log = logging.getLogger("doge_deploy.serve")


class Trial:
    """Compiles grammars in another process, which is started for the first of them, and anew after one that ended it.

    Thread-safe: one grammar after the other. Start it from a thread that lives as long as it is needed, see `Child`.

    Args:
        tokenizer_file, vocab_size, eos_ids: see `matchers.read_tokenizer`.
        seconds: how long a grammar may take.
    """

    def __init__(
        self, tokenizer_file: Path, vocab_size: int, eos_ids: Collection[int], seconds: float = COMPILE_SECONDS
    ) -> None:
        settings = json.dumps([str(tokenizer_file.resolve()), vocab_size, sorted(eos_ids)])
        self._command = worker_command("doge_deploy.serve.grammar.worker", settings)
        self._seconds = seconds
        self._child: Child | None = None
        self._ended = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        child = self._child
        return None if child is None else child.pid

    def compile(self, kind: Kind, text: str) -> None:
        """Return if a source compiles within the limits of time, stack and memory.

        Args:
            kind: what it is.
            text: of `matchers.source_text`.

        Raises:
            UsageError: it does not; why.
            DogeDeployError: no process can be started to try it.
            EngineStoppedError: `close` was called.
        """
        with self._lock:
            child = self._started()
            try:
                child.ask({"kind": kind, "text": text}, self._seconds)
            except ChildError as error:
                self._discard(child)
                self._require_open()
                _log.warning("grammar refused", extra={"fields": {"kind": kind, "reason": error.reason}})
                if isinstance(error, ChildTimeoutError):
                    raise UsageError(f"compiling takes longer than {self._seconds:g} s; make it simpler") from None
                raise UsageError("compiling needs more stack or memory than is given; make it simpler") from None

    def close(self) -> None:
        """End the process, whatever it does; what waits for it gets EngineStoppedError."""
        self._ended = True
        child = self._child
        if child is not None:
            child.kill()
        with self._lock:
            if self._child is not None:
                self._discard(self._child)

    def _started(self) -> Child:
        self._require_open()
        if self._child is not None and not self._child.running:  # it was ended from outside
            self._discard(self._child)
        if self._child is None:
            try:
                self._child = Child(self._command)
                self._require_open()
                if self._child.receive(START_SECONDS) is None:
                    raise self._child.failure()
            except (ChildError, DogeDeployError) as error:
                if self._child is not None:
                    self._discard(self._child)
                self._require_open()
                if isinstance(error, DogeDeployError):
                    raise
                raise DogeDeployError(f"structured output: the process that tries grammars {error}") from error
        return self._child

    def _discard(self, child: Child) -> None:
        self._child = None
        child.kill()
        child.__exit__(None, None, None)

    def _require_open(self) -> None:
        if self._ended:
            raise EngineStoppedError("the server is shutting down")

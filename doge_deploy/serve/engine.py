"""The thread that owns the scheduler and its runner; everybody else talks to it through two queues.

Requests, cancellations and questions go in as messages. Events of a call of the runner come out together, by one call
of `deliver`, so that an event loop is woken once a call, however many requests have a new token. Where calls are so
short that nobody would see the difference, the tokens of several come out together (see
docs/decisions/0037-pieces-of-a-stream.md).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from time import perf_counter
from typing import TypeVar

from doge_deploy.serve.request import Event, Produced, Request
from doge_deploy.serve.scheduler import Limits, Scheduler

Deliver = Callable[[list[tuple[str, Event]]], None]
"""Takes the events of a call, each with its request's id, in order; called in the engine's thread."""

HOLD_SECONDS = 0.004
"""Tokens that are not the first of a text wait for those of the next call where the last ones went out less than so
long ago: a quarter of the time between two pictures of a screen.
"""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Ask:
    work: Callable[[Scheduler], object]
    answer: Future[object]


class EngineStoppedError(RuntimeError):
    """The engine takes nothing more."""


class EngineFailedError(RuntimeError):
    """The engine's thread ended by a fault of its own."""


class Engine:
    """Runs a scheduler until it is stopped.

    Args:
        scheduler: used by the engine's thread alone from `start` on.
        deliver: gets the events.
    """

    def __init__(self, scheduler: Scheduler, deliver: Deliver) -> None:
        self._scheduler = scheduler
        self._deliver = deliver
        scheduler.after_call, scheduler.clock = self._after_call, perf_counter
        self._inbox: queue.SimpleQueue[_Ask | None] = queue.SimpleQueue()
        self._outbox: list[tuple[str, Event]] = []
        self._urgent = False
        """Something in the outbox is waited for."""
        self._sent = float("-inf")
        """When something was last delivered."""
        self._thread = threading.Thread(target=self._run, name="doge-engine", daemon=True)
        self._stopping = False
        self._gate = threading.Lock()
        """Nothing is put into the inbox after it was emptied for the last time."""
        self.failure: BaseException | None = None
        """What ended the thread, if it was not asked to end: nothing can be served then."""

    @property
    def scheduler(self) -> Scheduler:
        """Only single numbers of it may be read while the thread runs."""
        return self._scheduler

    def start(self) -> None:
        """Begin; to be called once."""
        self._thread.start()

    @property
    def limits(self) -> Limits:
        """How much is taken on; they do not change."""
        return self._scheduler.limits

    @property
    def alive(self) -> bool:
        """The thread runs."""
        return self._thread.is_alive() and self.failure is None

    def submit(self, request: Request) -> Future[None]:
        """Put a request into the queue; the result is there when it was taken.

        The future raises:
            QueueFullError: too much is waiting. EngineStoppedError: the engine has ended.
        """
        return self.submit_all([request])

    def submit_all(self, requests: Sequence[Request]) -> Future[None]:
        """The same for several, all of them or none."""
        for request in requests:
            request.send = partial(self._put, request.id)  # by its name: what holds itself is freed late
        return self.ask(lambda scheduler: scheduler.submit_all(requests))

    def cancel(self, request_id: str) -> Future[bool]:
        """End a request, wherever it is; whether there was one."""
        return self.ask(lambda scheduler: scheduler.cancel(request_id))

    def ask(self, work: Callable[[Scheduler], _Result]) -> Future[_Result]:
        """Do something with the scheduler before its next half of a step."""
        asked = _Ask(work, Future())
        with self._gate:
            if self._stopping:
                asked.answer.set_exception(EngineStoppedError("the engine has ended"))
            else:
                self._inbox.put(asked)
        return asked.answer  # type: ignore[return-value]

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread between two steps; requests that are there get no more events. Whether it ended in time."""
        with self._gate:
            self._stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            halves = cycle((self._scheduler.make_tokens, self._scheduler.feed_prompts))
            while self._read_inbox():  # before each half: a prompt that came while tokens were made is fed next
                self._after_call()
                next(halves)()
        except BaseException as error:  # a fault of our own: nobody may wait for ever
            self.failure = error
            self._scheduler.abort(EngineFailedError(f"the engine failed: {type(error).__name__}: {error}"))
            self._flush()
        finally:
            self._refuse_the_rest()

    def _read_inbox(self) -> bool:
        """Do what was asked for; waits while there is nothing to compute. False: stop."""
        while True:
            idle = self._scheduler.idle and not self._outbox
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if message is None:
                return False
            self._do(message)
            if self._scheduler.idle:
                self._flush()  # of a cancellation

    def _do(self, message: _Ask) -> None:
        if not message.answer.set_running_or_notify_cancel():
            return
        try:
            message.answer.set_result(message.work(self._scheduler))
        except Exception as error:
            message.answer.set_exception(error)
            del message  # the error holds this frame: with what was refused both would be freed late

    def _put(self, name: str, event: Event) -> None:
        self._outbox.append((name, event))
        self._urgent = self._urgent or not isinstance(event, Produced) or event.first

    def _after_call(self) -> None:
        """Tokens wait only where the next call is a step of the same texts: before a prompt is fed they go out."""
        next_is_step = bool(self._scheduler.decoding) and not (self._scheduler.prefilling or self._scheduler.waiting)
        if self._urgent or not next_is_step or perf_counter() - self._sent >= HOLD_SECONDS:
            self._flush()

    def _flush(self) -> None:
        if self._outbox:
            events, self._outbox = self._outbox, []
            self._urgent, self._sent = False, perf_counter()
            self._deliver(events)

    def _refuse_the_rest(self) -> None:
        with self._gate:
            self._stopping = True
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if message is not None and message.answer.set_running_or_notify_cancel():
                message.answer.set_exception(EngineStoppedError("the engine has ended"))

"""Requests that arrive at the same moment reach an idle engine together, so that their prompts are fed in one call.

Without this the first of them would be fed alone, the others would wait for its call, and its next tokens for theirs;
and on a machine with few processors the call would slow down the taking in of the others. Nothing waits for time to
pass: the event loop goes round, without sleeping, until it has found nothing new a few times, which takes one request
alone less than a tenth of a millisecond. Where the engine has work nothing waits: a request joins its next step.
"""

from __future__ import annotations

import asyncio

ROUNDS = 8
"""Rounds of the event loop without anything new after which nobody else is coming: there are four from the acceptance
of a connection to the first look at its request, and one connection is accepted in each."""

LONGEST_SECONDS = 0.005
"""However many come; and one that began so long ago and is not ready, such as a body that comes byte by byte, is not
waited for at all."""


class Arrival:
    """One request, from its first look to the moment when it is ready for the engine or was refused."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals: Arrivals | None = arrivals

    def over(self) -> None:
        """It is not waited for any more; may be called several times."""
        if self._arrivals is not None:
            del self._arrivals.coming[self]
            self._arrivals = None


class Arrivals:
    """Those of all models. Everything is done in the thread of the event loop."""

    def __init__(self) -> None:
        self.coming: dict[Arrival, float] = {}
        """Requests that have begun and are neither ready nor refused, the latest last, and when they began."""
        self._begun = 0
        """All that ever did."""
        self._tokens = 0
        """Of the prompts that are ready."""
        self._together: asyncio.Future[None] | None = None
        """What those that are ready wait for."""

    def begin(self) -> Arrival:
        """A request is there, and will have to be read, checked and encoded."""
        self._begun += 1
        arrival = Arrival(self)
        self.coming[arrival] = asyncio.get_running_loop().time()
        return arrival

    async def settled(self, tokens: int, enough: int) -> None:
        """Wait for the others that arrive now.

        Args:
            tokens: of the request's prompts.
            enough: tokens of all that are ready with which nobody else is waited for.
        """
        self._tokens += tokens
        if self._together is None:
            loop = asyncio.get_running_loop()
            self._together = loop.create_future()
            loop.call_soon(self._look, loop, loop.time() + LONGEST_SECONDS, enough, self._begun, 0)
        await asyncio.shield(self._together)

    def _look(self, loop: asyncio.AbstractEventLoop, deadline: float, enough: int, begun: int, rounds: int) -> None:
        latest = next(reversed(self.coming.values()), float("-inf"))
        comes = begun != self._begun or loop.time() - latest < LONGEST_SECONDS
        rounds = 0 if comes else rounds + 1
        if rounds < ROUNDS and self._tokens < enough and loop.time() < deadline:
            loop.call_soon(self._look, loop, deadline, enough, self._begun, rounds)
            return
        assert self._together is not None
        self._together.set_result(None)
        self._together, self._tokens = None, 0

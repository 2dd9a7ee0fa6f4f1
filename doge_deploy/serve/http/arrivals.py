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
"""However many come."""


class Arrival:
    """One request, from its first look to the moment when it is ready for the engine or was refused."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals: Arrivals | None = arrivals

    def over(self) -> None:
        """It is not waited for any more; may be called several times."""
        if self._arrivals is not None:
            self._arrivals.coming -= 1
            self._arrivals = None


class Arrivals:
    """Those of all models. Everything is done in the thread of the event loop."""

    def __init__(self) -> None:
        self.coming = 0
        """Requests that have begun and are neither ready nor refused."""
        self._begun = 0
        """All that ever did."""
        self._tokens = 0
        """Of the prompts that are ready."""
        self._together: asyncio.Future[None] | None = None
        """What those that are ready wait for."""

    def begin(self) -> Arrival:
        """A request is there, and will have to be read, checked and encoded."""
        self.coming += 1
        self._begun += 1
        return Arrival(self)

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
        rounds = rounds + 1 if begun == self._begun and not self.coming else 0
        if rounds < ROUNDS and self._tokens < enough and loop.time() < deadline:
            loop.call_soon(self._look, loop, deadline, enough, self._begun, rounds)
            return
        assert self._together is not None
        self._together.set_result(None)
        self._together, self._tokens = None, 0

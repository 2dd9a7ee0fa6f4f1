"""Continuous batching: requests join and leave at any step, and share the rows of one static cache.

A step makes one token for every request that is being decoded, admits requests to free slots, and feeds prompts under a
budget of tokens, so that a long prompt delays the next token of others by one chunk and no more. Where nobody waits for
a next token, prompts are fed in larger chunks. Short prompts that wait together are fed together (`prompts.py`), but
where only two wait while tokens are made, each has a step of its own: their texts then end one after the other, and so
do not bring the next two at the same moment. There is no thread in here, and no clock decides anything: given the same
arrivals between the same steps, the same steps are made, and the whole can be run under a clock that is not real.

Axes: V vocabulary, n requests that are decoded.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Protocol

from doge_deploy.errors import DogeDeployError
from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.logits import Logits
from doge_deploy.runtime.logprobs import log_probabilities
from doge_deploy.runtime.sampling import require_finite
from doge_deploy.runtime.speculation import DraftLength, NgramIndex
from doge_deploy.serve.prompts import Piece, Prompts, Rows
from doge_deploy.serve.request import Finished, FinishReason, PromptScored, Request, State
from doge_deploy.serve.slots import SlotTable

APART = 2
"""While texts are made, so many prompts that wait are fed one a step; more of them need the time that one call saves
(docs/decisions/0051-two-prompts-apart.md)."""


class Slots(Rows, Protocol):
    """What the scheduler needs of a `doge_deploy.runtime.slots.SlotRunner`, whose methods say more."""

    slots: int
    all_logits: bool

    def acquire(self) -> int: ...
    def prefill(self, slot: int, ids: Sequence[int]) -> Logits: ...
    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Logits: ...
    def extend(self, slots: Sequence[int], ids: Sequence[Sequence[int]], last: int = 1) -> Logits: ...


class QueueFullError(DogeDeployError):
    """No more requests are taken now."""


@dataclass(frozen=True)
class Limits:
    """What the scheduler may take on.

    Raises:
        ValueError: a number is not positive.
    """

    step_tokens: int = 128
    """Tokens of prompts that one step computes at most while texts are being made: what their next token is delayed by.
    """
    alone_tokens: int = 512
    """The same where no request is decoded: larger chunks take less time a token, and delay nobody."""
    together_tokens: int = 256
    """Tokens of several prompts in one call, padding included: with more of them hardly less time a token is taken, and
    the first of these prompts waits for the last."""
    queue_requests: int = 256
    """Requests that may wait."""
    queue_tokens: int = 262_144
    """Prompt tokens that may wait."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")

    def check_queue(self, count: int, tokens: int) -> None:
        """Whether so many requests with so many prompt tokens together may wait.

        Raises:
            QueueFullError: they are too many.
        """
        if count > self.queue_requests:
            raise QueueFullError(f"{count} requests would be waiting; the limit is {self.queue_requests}")
        if count > 1 and tokens > self.queue_tokens:  # one alone may be longer than the limit
            raise QueueFullError(f"{tokens} prompt tokens would be waiting; the limit is {self.queue_tokens}")


@dataclass
class Counters:
    """Totals since the start, for metrics."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    """Prompt tokens that were looked for in the slots, and of those..."""
    prefix_hits: int = 0
    """...how many were there."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    finished: dict[FinishReason, int] = field(default_factory=dict)


class Scheduler:
    """Owns the rows of a runner and the requests that use them. Every method is for one thread.

    Args:
        runner: the slots; the scheduler is their only user, and acquires all of them.
        limits: how much is taken on.
        step_costs: time of a call of Q tokens with all their logits over that of one token, by Q; without it nothing
            is guessed.
        exact_length: as long as a slot holds no more tokens, no key is dropped, so that guesses can be taken back.
    """

    def __init__(
        self,
        runner: Slots,
        limits: Limits | None = None,
        step_costs: Mapping[int, float] | None = None,
        exact_length: int | None = None,
    ) -> None:
        self.runner = runner
        self.limits = limits or Limits()
        self.table = SlotTable([runner.acquire() for _ in range(runner.slots)])
        self.counters = Counters()
        self.waiting: deque[Request] = deque()
        self.waiting_tokens = 0
        """Prompt tokens of the requests that wait; a running count, since a burst asks for it with every request."""
        self._prompts = Prompts(runner, self.table)
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self.after_call: Callable[[], None] = _nothing
        """Called when the events of a call of the runner have been sent: those of the next one come much later."""
        self.clock: Callable[[], float] = _no_time
        """Read where a request gets its slot, for `Started`, which goes out only behind the first call for it."""
        self._ngrams: defaultdict[Request, NgramIndex] = defaultdict(NgramIndex)
        """Of requests for which guesses were wanted. To make one takes as long as a call where a prompt is long."""
        self._exact_length = runner.max_length if exact_length is None else min(exact_length, runner.max_length)
        speculates = runner.all_logits and not runner.whole_prompts
        self._draft_length = DraftLength(step_costs) if speculates and step_costs else None

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not (self.waiting or self.prefilling or self.decoding)

    @property
    def active(self) -> list[Request]:
        """Requests that have a slot."""
        return [*self.decoding, *self.prefilling]

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def cache_usage(self) -> float:
        """Share of all slots that requests in flight use, 0 to 1."""
        used = sum(request.fed for request in self.active)
        return used / (self.runner.slots * self.runner.max_length)

    def submit(self, request: Request) -> None:
        """Put a request into the queue; raises as `submit_all`."""
        self.submit_all([request])

    def submit_all(self, requests: Sequence[Request]) -> None:
        """Put requests into the queue. Those that get the slots that are free now do not wait, however many come before
        slots are given away the next time.

        Raises:
            QueueFullError: too many requests or tokens would wait; none of the requests was taken.
            ValueError: a prompt does not fit into a slot; the caller checks that first.
        """
        for request in requests:
            if len(request.prompt_ids) > self.runner.max_length:
                raise ValueError(f"{len(request.prompt_ids)} tokens do not fit into {self.runner.max_length}")
        tokens = self.waiting_tokens + sum(len(request.prompt_ids) for request in requests)
        free = self.runner.slots - self.running
        count = len(self.waiting) + len(requests) - free
        waiting_tokens = tokens - sum(len(one.prompt_ids) for one in islice(chain(self.waiting, requests), free))
        self.limits.check_queue(count, waiting_tokens)
        self.waiting.extend(requests)
        self.waiting_tokens = tokens

    def check_alone(self, lengths: Sequence[int]) -> None:
        """Whether requests that belong together, of so many prompt tokens each, could be taken if nothing else were
        there. May be asked in any thread.

        Raises:
            QueueFullError: they never can.
        """
        waiting = lengths[self.runner.slots :]
        self.limits.check_queue(len(waiting), sum(waiting))

    def cancel(self, request_id: str) -> bool:
        """End a request wherever it is; its slot is free at once. False where no request has that id."""
        for request in self._all():
            if request.id == request_id:
                self._finish(request, Finished("cancelled"))
                return True
        return False

    def abort(self, error: Exception) -> None:
        """End every request with an error, the waiting ones too. The rows are left as they are, since the runner may be
        what failed: nothing more can be asked for.
        """
        for request in self._all():
            self._end(request, Finished("error", request.text.flush(), error))

    def step(self) -> None:
        """Both halves of a step. What submits requests while calls are made does so between the halves as well."""
        self.make_tokens()
        self.feed_prompts()

    def make_tokens(self) -> None:
        """One token, or an accepted draft, for each request that is decoded."""
        self.counters.steps += 1
        if self.decoding:
            self._decode()
            self.after_call()

    def feed_prompts(self) -> None:
        """Admit requests, and feed their prompts up to the budget of a step."""
        self._admit()
        self._prefill()

    def _all(self) -> Iterable[Request]:
        return [*self.decoding, *self.prefilling, *self.waiting]

    # slots

    def _admit(self) -> None:
        """Give free slots to the requests that wait longest: an idle slot that begins as the prompt does, where the
        prompt keeps most of what is there, else the least recently used.
        """
        while self.waiting and (free := self.table.free()):
            request = self.waiting.popleft()
            self.waiting_tokens -= len(request.prompt_ids)
            match = self.table.best_match(request.prompt_ids, free)
            keeps = match is not None and 2 * match.tokens >= len(match.held.tokens)
            held = match.held if match is not None and keeps else free[0]
            self.table.take(held)
            request.slot, request.state = held.slot, State.PREFILL
            request.slot_time = self.clock()
            self.prefilling.append(request)

    def _finish(self, request: Request, finished: Finished) -> None:
        if request.slot is not None and finished.reason == "error":  # what it holds is not to be trusted
            self._empty(request.slot)
        self._end(request, finished)

    def _empty(self, slot: int) -> None:
        self.runner.truncate(slot, 0)
        self.table[slot].tokens.clear()

    def _end(self, request: Request, finished: Finished) -> None:
        if request.state is State.QUEUED:
            self.waiting.remove(request)
            self.waiting_tokens -= len(request.prompt_ids)
        elif request in self.prefilling:
            self.prefilling.remove(request)
        elif request in self.decoding:
            self.decoding.remove(request)
        if request.slot is not None:
            self.table.give_back(self.table[request.slot])
        request.slot, request.state = None, State.DONE
        self._ngrams.pop(request, None)
        self.counters.finished[finished.reason] = self.counters.finished.get(finished.reason, 0) + 1
        request.send(finished)

    # prompts

    def _prefill(self) -> None:
        """Feed prompts, the oldest first, until the budget of the step is used up: many small pieces take longer than
        few, so a prompt is cut only where all of the budget is not enough for it.
        """
        fed = 0
        while True:
            # asked anew each time: a request that got its first token waits for the next one from then on
            somebody_waits = bool(self.decoding)
            budget = self.limits.step_tokens if somebody_waits else self.limits.alone_tokens
            apart = somebody_waits and len(self.prefilling) <= APART
            call = self._prompts.next_call(self.prefilling, budget, fed, self.limits.together_tokens, apart)
            if call is None:
                return
            for piece in call.pieces:
                if piece.first:
                    self.counters.prefix_queries += len(piece.request.prompt_ids)
                    self.counters.prefix_hits += piece.kept
            self._feed(call.pieces)
            # what nobody waited for is no part of what the first one waits for
            fed = fed + call.tokens if somebody_waits or not self.decoding else 0
            self.after_call()

    def _feed(self, pieces: Sequence[Piece]) -> None:
        """Feed pieces of different prompts in one call, and take what follows."""
        if len(pieces) > 1:
            slots = [piece.request.slot for piece in pieces if piece.request.slot is not None]
            try:
                logits = self.runner.extend(slots, [piece.ids for piece in pieces]).numpy()
            except Exception:  # whose fault it is shows when each is fed alone; and the rows may hold the pieces by now
                for piece, slot in zip(pieces, slots, strict=True):
                    self._empty(slot)
                    piece.request.fed, piece.request.alone = 0, True
                return
            for piece, row in zip(pieces, logits, strict=True):  # [R, Q or 1, V]: what is behind its own is padding
                self._fed(piece, row[min(len(piece.ids), len(row)) - 1])
            return
        (piece,) = pieces
        try:
            last = self._feed_alone(piece)
        except Exception as error:
            self._finish(piece.request, Finished("error", "", error))
        else:
            self._fed(piece, last)

    def _feed_alone(self, piece: Piece) -> FloatArray:
        """Feed a piece; the logits after its last token, `[V]`."""
        request, ids = piece.request, piece.ids
        assert request.slot is not None
        if not request.score_prompt:
            last: FloatArray = self.runner.prefill(request.slot, ids).numpy()[0, -1]
            return last
        every = self.runner.extend([request.slot], [ids], len(ids)).numpy()[0]
        self._score(request, ids, every)
        scored: FloatArray = every[-1]
        return scored

    def _fed(self, piece: Piece, logits: FloatArray) -> None:
        """The slot holds the piece; `logits` `[V]` are those after its last token."""
        request = piece.request
        assert request.slot is not None
        self.table[request.slot].tokens.extend(piece.ids)
        request.fed += len(piece.ids)
        self.counters.prompt_tokens += len(piece.ids)
        if request.fed < len(request.prompt_ids):
            return
        self.prefilling.remove(request)
        self.decoding.append(request)
        request.state = State.DECODE
        if request.score_prompt:
            request.send(PromptScored(tuple(request.prompt_scores)))
        if request.max_new_tokens == 0:
            self._finish(request, Finished("length"))
            return
        self._take(request, logits)

    def _score(self, request: Request, ids: Sequence[int], logits: FloatArray) -> None:
        """Logprobs of the prompt's tokens: each from the logits of the token before it.

        Raises:
            UnsupportedModelError: the logits hold NaN.
        """
        if not request.prompt_scores:
            request.prompt_scores.append(None)
        following = request.prompt_ids[request.fed + 1 : request.fed + len(ids) + 1]
        top = request.logprobs or 0
        rows = logits.astype("float32")
        for length, row in enumerate(rows, request.fed + 1):
            require_finite(row, length)
        for row, token in zip(rows, following, strict=False):
            request.prompt_scores.append(log_probabilities(row, token, top))

    # tokens

    def _decode(self) -> None:
        """One token, or an accepted draft, for each request that is decoded."""
        prompts_wait = self.prefilling or (self.waiting and self.table.free())
        if len(self.decoding) == 1 and not prompts_wait and (draft := self._draft(self.decoding[0])):
            self._check_draft(self.decoding[0], draft)
            return
        batch = list(self.decoding)
        ids = [request.context[-1] for request in batch]
        slots = [request.slot for request in batch if request.slot is not None]
        try:
            logits = self.runner.decode(slots, ids).numpy()[:, -1]
        except Exception as error:  # one call for all of them: none has a result
            for request in batch:
                self._finish(request, Finished("error", request.text.flush(), error))
            return
        for request, token in zip(batch, ids, strict=True):
            assert request.slot is not None
            self.table[request.slot].tokens.append(token)
            request.fed += 1
        for request, row in zip(batch, logits, strict=True):
            self._take(request, row)

    def _take(self, request: Request, logits: FloatArray) -> bool:
        """Choose the next token from `logits` `[V]`; whether the request goes on."""
        try:
            token, logprobs = request.choose(logits)
            finished = request.accept(token, logprobs, self.runner.max_length)
        except Exception as error:  # NaN, or a grammar that allows nothing: of this row alone
            self._finish(request, Finished("error", request.text.flush(), error))
            return False
        self.counters.generated_tokens += 1
        if finished is not None:
            self._finish(request, finished)
        return finished is None

    def _draft(self, request: Request) -> list[int]:
        """Tokens to guess for the only request that runs: with more of them a batch is the better use of a call."""
        if self._draft_length is None or not request.speculate or request.slot is None:
            return []
        room = min(
            self._exact_length - len(self.table[request.slot].tokens) - 1,
            request.max_new_tokens - request.produced - 1,
        )
        length = min(self._draft_length.choose(), room)
        if length <= 0:
            return []
        ngrams = self._ngrams[request]
        ngrams.extend(request.context[len(ngrams) :])
        return ngrams.draft(length)

    def _check_draft(self, request: Request, draft: Sequence[int]) -> None:
        """Feed the last token with a draft behind it, and accept the draft as far as the sampler picks the same."""
        assert request.slot is not None and self._draft_length is not None
        held, slot, last = self.table[request.slot], request.slot, request.context[-1]
        try:
            logits = self.runner.extend([slot], [[last, *draft]], 1 + len(draft)).numpy()[0]
        except Exception as error:
            self._finish(request, Finished("error", request.text.flush(), error))
            return
        held.tokens.append(last)
        request.fed += 1
        accepted, goes_on = 0, self._take(request, logits[0])
        while goes_on and accepted < len(draft) and request.context[-1] == draft[accepted]:
            held.tokens.append(draft[accepted])
            request.fed += 1
            accepted += 1
            goes_on = self._take(request, logits[accepted])
        if held.tokens:  # an error has emptied the row already
            self.runner.truncate(slot, len(held.tokens))
        self._draft_length.learn(len(draft), accepted)
        request.drafts += len(draft)
        request.accepted += accepted
        self.counters.draft_tokens += len(draft)
        self.counters.accepted_tokens += accepted


def _nothing() -> None:
    """Where nobody wants to know."""


def _no_time() -> float:
    """Where nobody asks for it."""
    return 0.0

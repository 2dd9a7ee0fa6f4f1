"""Independent rows of one static cache, by names that stay: what a server runs texts on.

Each slot holds one text. Slots are acquired and released at any time between two calls, fed together or one by one, and
copied and cut where that is exact. What a slot gives is what its text gives when it is run alone.

Axes: S slots, R slots of a call, Q tokens of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from doge_deploy.bundle.opening import Bundle
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.runtime.backend import open_backend
from doge_deploy.runtime.base import IntArray
from doge_deploy.runtime.logits import Logits
from doge_deploy.runtime.rows import RowsRunner, padded


class SlotRunner:
    """S texts in the rows of a runner, which nobody else may call meanwhile.

    Slot numbers are 0 to S - 1 and stay; the rows that they stand for change places so that each call is over
    neighbouring rows (see docs/decisions/0026-slots.md). Every method that feeds tokens gives logits, which the next
    one overwrites.

    Args:
        runner: of a bundle that `refusal` has no objection to.
        slots: S, at least 1.

    Raises:
        UsageError: S is not positive, or the backend was built for fewer rows.
    """

    def __init__(self, runner: RowsRunner, slots: int) -> None:
        if slots < 1:
            raise UsageError(f"slots={slots}: must be at least 1")
        for rows in {1, slots}:
            if reason := runner.refusal(rows, 1):
                raise UsageError(reason)
        self.slots = slots
        self.max_length = runner.max_length
        """Tokens that a slot can hold."""
        self.vocab_size = runner.vocab_size
        self.all_logits = not runner.last_logits or runner.many_logits
        """Whether `extend` gives the logits of all tokens of a call where that is asked for."""
        self.whole_prompts = runner.whole_calls
        """Whether a prompt must come in one call: in pieces it would be another text."""
        self._runner = runner
        self._row = list(range(slots))
        """The row of each slot."""
        self._used: set[int] = set()
        runner.reset(slots)

    @property
    def free(self) -> int:
        """How many slots can be acquired."""
        return self.slots - len(self._used)

    def acquire(self) -> int:
        """An empty slot.

        Raises:
            UsageError: none is free.
        """
        if not self.free:
            raise UsageError(f"no slot is free: all {self.slots} are in use, release one first")
        # The lowest row, so that those in use stay together.
        slot = min((slot for slot in range(self.slots) if slot not in self._used), key=self._row.__getitem__)
        self._used.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Forget what the slot holds and give it back.

        Raises:
            UsageError: the slot is not in use.
        """
        self._runner.clear_row(self._row_of(slot))
        self._used.remove(slot)

    def length(self, slot: int) -> int:
        """Tokens that the slot holds.

        Raises:
            UsageError: the slot is not in use.
        """
        return int(self._runner.row_lengths[self._row_of(slot)])

    def prefill(self, slot: int, ids: Sequence[int] | IntArray) -> Logits:
        """Feed a prompt, or the next piece of it, to one slot: `[1, Q or 1, V]`. No other row is touched or computed.

        Raises:
            UsageError: the slot is not in use, there is no token, a token is none of the vocabulary's, the tokens do
                not fit, or the prompt must come whole (`whole_prompts`) and the slot holds something.
        """
        return self.extend([slot], [ids])

    def decode(self, slots: Sequence[int], ids: Sequence[int] | IntArray) -> Logits:
        """Feed one token to each of these slots: `[R, 1, V]`, in their order.

        Raises:
            UsageError: as `extend`.
        """
        return self.extend(slots, [[token] for token in ids])

    def extend(self, slots: Sequence[int], ids: Sequence[Sequence[int] | IntArray], last: int = 1) -> Logits:
        """Feed the next tokens of these slots in one call, to each its own number of them.

        Args:
            slots: R different ones, in any order.
            ids: for each its next tokens, at least one.
            last: of how many of the last tokens of each slot logits are needed; more than 1 with `all_logits` only,
                and then every slot gets as many tokens as the others.

        Returns:
            in the order of `slots`: those of each slot's last tokens, `[R, last, V]`; from a bundle that gives the
            logits of every token, all of them, `[R, Q, V]`, of which those beyond a slot's own tokens mean nothing.

        Raises:
            UsageError: a slot is not in use or given twice, gets no token or one that is none of the vocabulary's, or
                has not enough space for Q tokens, Q being that of the slot which gets most.
        """
        rows = self._rows_of(slots)
        if len(ids) != len(slots):
            raise UsageError(f"{len(slots)} slots and tokens for {len(ids)}: give each slot its own")
        arrays = [self._checked(slot, tokens) for slot, tokens in zip(slots, ids, strict=True)]
        input_ids, lengths = padded(arrays)
        self._check_space(slots, arrays, input_ids.shape[1])
        if reason := self._runner.refusal(*input_ids.shape):
            raise UsageError(reason)
        if last > 1 and not self.all_logits:
            raise UsageError(f"last={last}: this bundle gives the logits of one token of a call")
        if last > int(lengths.min()) or (last > 1 and len(set(lengths.tolist())) > 1):
            raise UsageError(
                f"last={last}: the slots get {lengths.tolist()} tokens; give each as many, at least {last}"
            )
        first = self._neighbours(rows)
        rows = [self._row[slot] for slot in slots]
        order = np.argsort(rows)
        rows_last = last if self._runner.last_logits else 1
        logits = self._runner.run_rows(first, input_ids[order], lengths[order], rows_last)
        return logits if (order[1:] > order[:-1]).all() else logits.rows(np.argsort(order))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """`target` holds the first `tokens` of `source` and nothing else.

        Raises:
            UsageError: a slot is not in use, both are the same, `source` does not hold so many tokens, or it has
                dropped keys and less than all of it is asked for.
        """
        from_row, to_row = self._rows_of([source, target])
        held = self.length(source)
        if not 1 <= tokens <= held:
            raise UsageError(f"copy: slot {source} holds {held} tokens; {tokens} of them cannot be copied")
        if tokens < held:
            self._check_cut(source, tokens, "copy")
        self._runner.copy_row(from_row, to_row, tokens)

    def truncate(self, slot: int, tokens: int) -> None:
        """The slot holds its first `tokens` only.

        Raises:
            UsageError: the slot is not in use, holds fewer, or has dropped keys: which of them its first tokens would
                have is no longer known.
        """
        held = self.length(slot)
        if not 0 <= tokens <= held:
            raise UsageError(f"truncate: slot {slot} holds {held} tokens, and cannot be cut to {tokens}")
        if 0 < tokens < held:
            self._check_cut(slot, tokens, "truncate")
        if tokens < held or not tokens:  # a call that failed may have left something in a row that held nothing
            self._runner.truncate_row(self._row_of(slot), tokens)

    def can_cut(self, slot: int) -> bool:
        """Whether `truncate`, and `copy` of less than all of it, are exact.

        Raises:
            UsageError: the slot is not in use.
        """
        return not self.whole_prompts and not self._runner.has_dropped(self._row_of(slot))

    def take_memory(self) -> None:
        """Have the system give the memory of all slots now, not when each is used for the first time."""
        self._runner.take_memory()

    def joins(self, lengths: Sequence[int]) -> bool:
        """Whether `extend` of slots with so many tokens each can be run, and gives every one of them what it gets alone
        except for the rounding of another number of rows.
        """
        if self.whole_prompts or not self._runner.joins(lengths):
            return False
        return self._runner.refusal(len(lengths), max(lengths)) is None

    def _check_cut(self, slot: int, tokens: int, what: str) -> None:
        if self.can_cut(slot):
            return
        reason = (
            "what its first tokens left depends on the tokens that came with them"
            if self.whole_prompts
            else "it dropped keys that its first tokens had"
        )
        raise UsageError(f"{what}: slot {slot} cannot be cut to {tokens} tokens: {reason}; feed them again")

    def _row_of(self, slot: int) -> int:
        if slot not in self._used:
            used = ", ".join(map(str, sorted(self._used))) or "none"
            raise UsageError(f"slot {slot} is not in use; in use: {used}")
        return self._row[slot]

    def _rows_of(self, slots: Sequence[int]) -> list[int]:
        if not slots:
            raise UsageError("no slot is given; give at least one")
        rows = [self._row_of(slot) for slot in slots]
        if len(set(rows)) < len(rows):
            twice = next(slot for index, slot in enumerate(slots) if slot in slots[:index])
            raise UsageError(f"slot {twice} is given twice")
        return rows

    def _checked(self, slot: int, ids: Sequence[int] | IntArray) -> IntArray:
        array = np.asarray(ids, np.int64)
        if array.ndim != 1 or not array.size:
            raise UsageError(f"slot {slot} gets no token; give a list of at least one")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise UsageError(f"token {wrong} for slot {slot}: must be 0 to {self.vocab_size - 1}")
        if self.whole_prompts and array.size > 1 and self.length(slot):
            raise UsageError(
                f"slot {slot} holds {self.length(slot)} tokens, and this bundle takes a prompt in one call only: what "
                "a token gets depends on the tokens that come with it"
            )
        return array

    def _check_space(self, slots: Sequence[int], arrays: Sequence[IntArray], width: int) -> None:
        for slot, array in zip(slots, arrays, strict=True):
            held = self.length(slot)
            if held + width > self.max_length:
                beside = f" in a call of {width}" if width > array.size else ""
                raise UsageError(
                    f"slot {slot} holds {held} tokens, and {array.size} more{beside} do not fit: max_length is "
                    f"{self.max_length}"
                )

    def _neighbours(self, rows: Sequence[int]) -> int:
        """Make the slots at `rows` neighbours where they are not; returns their first row."""
        wanted = set(rows)
        count = len(wanted)
        if max(wanted) - min(wanted) + 1 == count:
            return min(wanted)
        # The rows that take the fewest tokens to move: those of slots that must come in, and those they change with.
        held = self._runner.row_lengths
        inside = np.array([row in wanted for row in range(self.slots)])
        moved = np.where(inside, -held, held)

        def cost(first: int) -> int:
            # what must come in is all that is wanted less what is there; what must go out is there and not wanted
            return int(moved[first : first + count].sum())

        first = min(range(self.slots - count + 1), key=cost)
        place = range(first, first + count)
        outside = sorted(wanted - set(place))
        for here, there in zip((row for row in place if row not in wanted), outside, strict=True):
            self._swap(here, there)
        return first

    def _swap(self, a: int, b: int) -> None:
        self._runner.swap_rows(a, b)
        one, other = self._row.index(a), self._row.index(b)
        self._row[one], self._row[other] = b, a


def refusal(bundle: Bundle, slots: int) -> str | None:
    """Why the rows of a bundle are not independent, or no rows at all, and what to do; None: they are."""
    manifest = bundle.manifest
    if manifest.task != "causal-lm":
        return f"{bundle.path} is for {manifest.task}: it has no cache, each text is one call"
    if "static" not in manifest.layouts:
        return (
            f"{bundle.path} has the growing layout only, whose rows grow together: export it with "
            "--kv-cache static for slots"
        )
    if slots > 1 and manifest.routing_mixes:
        return (
            f"{bundle.path} routes experts as transformers does, which mixes the tokens of all rows of a call: export "
            "it with --routing per-token, or use one slot"
        )
    return None


def open_slots(bundle: Bundle, slots: int, backend: str = DEFAULT_BACKEND, **options: Any) -> SlotRunner:
    """Slots of a bundle's static layout.

    Args:
        bundle: an opened bundle.
        slots: S, at least 1.
        backend, options: see `open_backend`.

    Raises:
        UsageError: S is not positive, or a profile of the engine does not take so many rows.
        UnsupportedModelError: see `refusal`; or the backend has no rows of its own.
        MissingDependencyError, BrokenBundleError: see `open_backend`.
    """
    if reason := refusal(bundle, slots):
        raise UnsupportedModelError(reason)
    runner = open_backend(bundle, backend, layout="static", **options)
    if not isinstance(runner, RowsRunner):
        raise UnsupportedModelError(f"--backend {backend} runs the rows of a batch together only; it has no slots")
    return SlotRunner(runner, slots)

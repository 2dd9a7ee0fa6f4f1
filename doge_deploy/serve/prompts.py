"""Which tokens of which prompts are fed next: not those that the slots hold already, and those of several short prompts
in one call.

A call takes a part of its time whatever it computes, so short prompts take less time together than one after the other.
Rows of a call that are shorter than its longest are padded on the right. That is exact: padding lies behind a row's own
tokens, which do not see it, and the row's next tokens overwrite it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from doge_deploy.serve.request import Request, Started
from doge_deploy.serve.slots import Held, SlotTable, common_prefix

COPY_GAIN = 16
"""A prefix of so many tokens is worth copying from another slot."""

PADDING = 16
"""Tokens of padding, for each row that joins a call, that take no longer than the call that is saved: what a call takes
beside its tokens is as long as 16 tokens (60M int8) to 64 (20M fp32) on 2 cores of an AMD EPYC."""

ALONE = 32
"""A prompt of so many tokens or more is worth a step of its own: with fewer a call takes hardly longer for two."""


class Rows(Protocol):
    """What this needs of a `doge_deploy.runtime.slots.SlotRunner`, whose methods say more."""

    max_length: int
    whole_prompts: bool

    def joins(self, lengths: Sequence[int]) -> bool: ...
    def copy(self, source: int, target: int, tokens: int) -> None: ...
    def truncate(self, slot: int, tokens: int) -> None: ...
    def can_cut(self, slot: int) -> bool: ...


@dataclass(frozen=True)
class Piece:
    """Tokens of a prompt that are fed next."""

    request: Request
    kept: int
    """How many tokens of the prompt stand before them."""
    ids: Sequence[int]
    source: Held | None = None
    """The slot that those before are copied from; None where the request's own has them."""
    first: bool = False
    """Nothing of the prompt was fed before."""

    @property
    def after(self) -> Sequence[int]:
        """What the slot will hold."""
        return self.request.prompt_ids[: self.kept + len(self.ids)]


class PromptCall:
    """Pieces of different prompts that are fed in one call, the oldest first.

    Args:
        first: fed in any case.
        most: tokens of the call where it has several rows, padding included.
        rows: what feeds them.
    """

    def __init__(self, first: Piece, most: int, rows: Rows) -> None:
        self.pieces = [first]
        self._most, self._rows = most, rows

    @property
    def width(self) -> int:
        """Tokens of its longest row."""
        return max(len(piece.ids) for piece in self.pieces)

    @property
    def tokens(self) -> int:
        """Tokens that it computes, padding included."""
        return len(self.pieces) * self.width

    @property
    def has_room(self) -> bool:
        """Whether any piece could join."""
        return self.pieces[0].request.joins and self.tokens + self.width <= self._most

    def takes(self, piece: Piece) -> bool:
        """Whether `piece` may join: about as long as the others, in rows with space for all. What is only a part of the
        rest of its prompt is as long as the budget, and never joins.
        """
        pieces = [*self.pieces, piece]
        lengths = [len(one.ids) for one in pieces]
        width = max(lengths)
        tokens = len(pieces) * width
        return (
            piece.request.joins
            and tokens <= self._most
            and tokens - sum(lengths) <= PADDING * (len(pieces) - 1)
            and all(one.kept + width <= self._rows.max_length for one in pieces)
            and self._rows.joins(lengths)
        )


class Prompts:
    """Decides for the prompts of a scheduler, and brings their slots to where they are fed.

    Args:
        rows: what feeds them.
        table: what the slots hold.
    """

    def __init__(self, rows: Rows, table: SlotTable) -> None:
        self._rows, self._table = rows, table

    def next_call(
        self, waiting: Iterable[Request], budget: int, fed: int, together: int, apart: bool = False
    ) -> PromptCall | None:
        """The oldest prompt that is not fed whole, and others that are fed with it: their slots are brought to where
        they are fed.

        Args:
            waiting: requests whose prompts are not fed whole, the oldest first.
            budget: tokens of a step; a prompt is cut only where all of it is not enough.
            fed: how many of them are used up.
            together: tokens of several prompts in one call.
            apart: a step feeds one prompt of `ALONE` tokens or more, and no other with it.

        Returns:
            None where nobody waits, or the rest of the step is not for the oldest.
        """
        call: PromptCall | None = None
        for request in waiting:
            piece = self._piece(request, budget)
            if call is None:
                if fed and (fed + len(piece.ids) > budget or (apart and _is_worth_a_step(piece))):
                    return None
                call = PromptCall(piece, min(budget - fed, together), self._rows)
            elif not call.has_room:
                break
            elif (
                (apart and any(map(_is_worth_a_step, (call.pieces[0], piece))))
                or not call.takes(piece)
                or self._gains_from(call, piece)
            ):
                continue
            else:
                call.pieces.append(piece)
            self._begin(piece)
        return call

    def _piece(self, request: Request, most: int) -> Piece:
        """What would be fed of a request now, at most `most` tokens where its prompt may be cut; nothing is changed.

        The best source of its first tokens is looked for only now, not when the request was admitted: a request with
        the same beginning may have been fed in between.
        """
        assert request.slot is not None
        kept, source = request.fed, None
        if not (request.started or request.score_prompt or self._rows.whole_prompts):  # else all of it is fed
            held = self._table[request.slot]
            kept = min(common_prefix(held.tokens, request.prompt_ids), len(request.prompt_ids) - 1)
            if kept < len(held.tokens) and not self._rows.can_cut(held.slot):
                kept = 0
            best = self._table.best_match(request.prompt_ids)
            if best is not None and best.held is not held and best.tokens >= kept + COPY_GAIN:
                whole = best.tokens == len(best.held.tokens)
                if whole or self._rows.can_cut(best.held.slot):
                    kept, source = best.tokens, best.held
        ids = request.prompt_ids[kept:]
        return Piece(request, kept, ids if self._rows.whole_prompts else ids[:most], source, not request.started)

    def _begin(self, piece: Piece) -> None:
        """Bring the slot to what the piece is fed behind."""
        request = piece.request
        if not piece.first:
            return
        assert request.slot is not None
        held = self._table[request.slot]
        if piece.source is not None:
            self._rows.copy(piece.source.slot, held.slot, piece.kept)
        elif piece.kept < len(held.tokens):
            self._rows.truncate(held.slot, piece.kept)
        held.tokens[:] = request.prompt_ids[: piece.kept]
        request.fed, request.started = piece.kept, True
        request.send(Started(piece.kept, request.slot_time))

    def _gains_from(self, call: PromptCall, piece: Piece) -> bool:
        """Whether half of the piece or more can be copied when the call has been made."""
        worth = piece.kept + max(COPY_GAIN, len(piece.ids) // 2)
        return piece.first and any(
            common_prefix(other.after, piece.request.prompt_ids) >= worth for other in call.pieces
        )


def _is_worth_a_step(piece: Piece) -> bool:
    return len(piece.ids) >= ALONE

"""The calls of a case in the reference, in the form in which `Replay` makes them in a bundle.

Axes: B rows, Q tokens of a call, K cached keys after it, V vocabulary, N = B*Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from doge_deploy.verify.cases import Call, Case
from doge_deploy.verify.compare import Array
from doge_deploy.verify.reference import Reference, ReferenceRows, Watch
from doge_deploy.verify.replay import Choices, Replay, Selections


@dataclass
class ReplayTrace:
    """The reference's run of the same case; fields as in `CandidateTrace` and `Watch`."""

    logits: list[Array] = field(default_factory=list)
    present: dict[str, list[Array]] = field(default_factory=dict)
    router: dict[int, list[Array]] = field(default_factory=dict)
    violation: dict[str, float] = field(default_factory=dict)
    classes: list[Array] = field(default_factory=list)
    gap: float = float("inf")
    differing: int = 0
    choices: list[Choices] = field(default_factory=list)
    """Per call, where they were asked for."""

    def note(self, watch: Watch) -> None:
        """Take over what was seen in one call."""
        self.gap = min(self.gap, watch.gap)
        self.differing += watch.differing
        self.classes += [row.double().numpy() for row in watch.classes]
        for name, value in watch.violation.items():
            self.violation[name] = max(self.violation.get(name, 0.0), value)
        for layer, halves in watch.router.items():
            self.router.setdefault(layer, []).append(halves.double().numpy())


def run_reference(
    replay: Replay,
    reference: Reference,
    case: Case,
    given: Sequence[Selections] | None = None,
    *,
    use_given: bool = True,
    note_choices: bool = False,
) -> ReplayTrace:
    """Run `case` on the reference.

    Args:
        replay: how the calls are made.
        reference: transformers' model.
        case: the calls.
        given: selections for each call, see `Reference.__call__`.
        use_given: whether they replace the reference's own.
        note_choices: note the reference's own selections, which take as much memory as those of a bundle.
    """
    batch = len(case.calls[0].lengths)
    single = replay.tokenwise
    ragged = not single and any(call.lengths.min() < call.input_ids.shape[1] for call in case.calls)
    rows = [
        ReferenceRows(reference, 1 if single else batch, replay.padding, ragged=ragged, note_choices=note_choices)
        for _ in range(batch if single else 1)
    ]
    trace = ReplayTrace()
    scores: list[dict[int, torch.Tensor]] = [{} for _ in rows]
    columns = 0
    for index, call in enumerate(case.calls):
        selected = given[index] if given is not None else None
        columns += call.input_ids.shape[1]
        choices = Choices({}, {})
        if single:
            logits = _run_tokenwise(replay, rows, call, selected, use_given, trace, scores, choices, columns)
        else:
            last = 1 if replay.last_logits else None
            logits, watch = rows[0].run(call.input_ids, call.lengths, selected, use_given=use_given, last=last)
            trace.note(watch)
            scores[0] = watch.scores
            _note_call(choices, watch, columns)
        if note_choices:
            trace.choices.append(choices)
        trace.logits += [(row[-1:] if replay.last_logits else row).double().numpy() for row in logits]
    for row, row_scores in zip(rows, scores, strict=True):
        for name, tensors in row.present(row_scores).items():
            held = replay.held_slots([tensor.double().numpy() for tensor in tensors])
            trace.present.setdefault(name, []).extend(held)
    return trace


def _run_tokenwise(
    replay: Replay,
    rows: Sequence[ReferenceRows],
    call: Call,
    given: Selections | None,
    use_given: bool,
    trace: ReplayTrace,
    scores: list[dict[int, torch.Tensor]],
    choices: Choices,
    columns: int,
) -> list[torch.Tensor]:
    width = call.input_ids.shape[1]
    lengths = [int(length) for length in call.lengths]
    # Padding on the left takes up slots of the cache: it is fed too. That on the right is overwritten.
    added = lengths if replay.padding == "left" else [width] * len(rows)
    longest = max(int(row.real.sum()) + count for row, count in zip(rows, added, strict=True))
    logits = []
    for b, row in enumerate(rows):
        offset = width - lengths[b] if replay.padding == "left" else 0
        outputs = []
        for column in range(offset + lengths[b]):
            part = _of_token(given, b, column, width, row.real.shape[1] + 1) if given else None
            q = max(column - offset, 0)
            real = np.array([int(column >= offset)])
            ids = call.input_ids[b : b + 1, q : q + 1]
            (output,), watch = row.run(ids, real, part, use_given=use_given, longest=longest)
            if real:
                outputs.append(output)
                trace.note(watch)
                _note_token(choices, watch, b, column, len(rows), width, columns)
            scores[b] = watch.scores
        logits.append(torch.cat(outputs))
    return logits


def _note_call(choices: Choices, watch: Watch, columns: int) -> None:
    """What the reference chose in a call, its keys in all `columns` so far: a sliding cache has lost the first."""
    for name, (own, judged) in watch.choices.items():
        if name.startswith("kept."):
            lost = columns - own.shape[-1]
            own = np.concatenate((np.zeros((*own.shape[:-1], lost), bool), own), axis=-1)
        choices.own[name], choices.judged[name] = own, judged


def _note_token(choices: Choices, watch: Watch, row: int, token: int, batch: int, width: int, columns: int) -> None:
    """The same of one token that was a call of its own; the inverse of `_of_token`."""
    for name, (own, _) in watch.choices.items():
        if name.startswith("kept."):
            if name not in choices.own:
                choices.own[name] = np.zeros((batch, own.shape[1], width, columns), bool)
                choices.judged[name] = np.zeros((batch, width), bool)
            seen = int(watch.held)
            choices.own[name][row, :, token, seen - own.shape[-1] : seen] = own[0, :, 0]
            choices.judged[name][row, token] = True
        else:
            if name not in choices.own:
                choices.own[name] = np.zeros((batch * width, own.shape[1]), np.int64)
                choices.judged[name] = np.zeros(batch * width, bool)
            choices.own[name][row * width + token] = own[0]
            choices.judged[name][row * width + token] = True


def _of_token(given: Selections, row: int, token: int, width: int, held: int) -> Selections:
    """The part of a call's selections that belongs to one token, which sees `held` keys."""
    return {
        name: selection[row : row + 1, :, token : token + 1, :held]
        if name.startswith("kept.")
        else selection[row * width + token][None]
        for name, selection in given.items()
    }

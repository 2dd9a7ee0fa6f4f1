"""A recording as an oracle: what the reference once answered, read from a file.

It cannot be run again with another's selections: cases in which something is selected are in it only where the
reference's choice is clear, and a bundle must choose the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from doge_deploy.bundle.files import WEIGHTS_FILE
from doge_deploy.bundle.manifest import Manifest
from doge_deploy.bundle.opening import Bundle
from doge_deploy.bundle.typed_json import ILLEGAL, typed
from doge_deploy.diagnostics import join_findings
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.verify.cases import Call, Case
from doge_deploy.verify.compare import Array, Difference, Distribution, difference
from doge_deploy.verify.noise import Noise
from doge_deploy.verify.oracle import Expected, HeldOut, Judged, Oracle, SelfDifference, WeightsResult
from doge_deploy.verify.recording.container import Container, read_container
from doge_deploy.verify.recording.places import columns_of, held, places
from doge_deploy.verify.recording.schema import (
    KIND,
    RecordedCall,
    RecordedCase,
    RecordedLogits,
    RecordedNoise,
    RecordedTensor,
    Recording,
)
from doge_deploy.verify.recording.subject import first_difference, subject_of
from doge_deploy.verify.recording.weights import hash_weights
from doge_deploy.verify.replay import CandidateTrace, Replay, Selections, digests_of


def open_recording(path: Path) -> RecordedOracle:
    """Read a recording; its tensors are read when they are asked for.

    Raises:
        UsageError: there is no such file.
        UnsupportedModelError: it is damaged, or no recording.
    """
    container = read_container(path, KIND, "a recording, written by `doge-deploy record BUNDLE -o FILE`")
    findings: list[str] = []
    recording = typed(Recording, container.document, "", findings)
    if recording is ILLEGAL or findings:
        raise container.damaged(join_findings(findings))
    return RecordedOracle(container, recording)


class RecordedOracle(Oracle):
    """Answers from a file.

    Args:
        container: the file.
        recording: its document.
    """

    follows = False

    def __init__(self, container: Container, recording: Recording) -> None:
        self.container, self.recording = container, recording
        self.name = recording.reference
        self._cases = {(case.layout, case.name): case for case in recording.cases}

    @property
    def description(self) -> str:
        made = ", ".join(f"{name} {version}" for name, version in self.recording.made_with.items())
        return f"{self.container.path} (sha256 {self.container.sha256[:12]}..., made with {made})"

    def check(self, bundle: Bundle) -> None:
        """Refuse a bundle that this is no recording of.

        Raises:
            UnsupportedModelError: naming the first thing in which they differ.
        """
        found = first_difference(self.recording.subject, subject_of(bundle.manifest))
        if found is not None:
            raise UnsupportedModelError(
                f"{self.container.path} is not a recording of {bundle.path}: {found}; "
                f"make one of this bundle: doge-deploy record {bundle.path} -o FILE"
            )
        self._manifest = bundle.manifest

    def check_layouts(self, bundle: Bundle, layouts: Sequence[str]) -> None:
        for layout in layouts:
            if layout not in self.recording.layouts:
                raise UnsupportedModelError(
                    f"{self.container.path} has no recording of the {layout} layout of {bundle.path}; it has: "
                    f"{', '.join(self.recording.layouts)}"
                )

    def weights(self, bundle: Bundle) -> WeightsResult:
        found, failures = hash_weights(bundle.path), []
        for name, digest in found.items():
            if name not in self.recording.weights:
                failures.append(f"{name} is not a tensor of the checkpoint")
            elif digest != self.recording.weights[name]:
                failures.append(f"{name}: its numbers differ from the checkpoint's, by their sha256")
        missing = sorted(self.recording.weights.keys() - found.keys())
        failures += [f"{name} is not in {WEIGHTS_FILE}" for name in missing]
        return WeightsResult(len(found), tuple(failures))

    def itself(self) -> SelfDifference | None:
        found = self.recording.itself
        return None if found is None else SelfDifference(found.prefill_against_decode, found.scale)

    def case_names(self) -> Sequence[str]:
        return self.recording.names

    def case(self, name: str, judged: Judged) -> Case | str:
        recorded = self._cases.get((judged.layout, name))
        if recorded is None:
            reason = self.recording.left_out.get(f"{judged.layout}/{name}")
            return reason or "is not in the recording"
        return Case(name, self._calls(recorded.calls, name), recorded.exact)

    def _calls(self, recorded: Sequence[RecordedCall], what: str) -> tuple[Call, ...]:
        """Calls that a bundle of this manifest can be given, whatever the file says."""
        manifest: Manifest = self._manifest
        calls: list[Call] = []
        rows: Array | None = None
        for call in recorded:
            ids = self.container.read(call.ids, ("int64",), f"a call of {what!r}")
            lengths = self.container.read(call.lengths, ("int64",), f"a call of {what!r}")
            legal = ids.ndim == 2 and ids.size > 0 and lengths.shape == ids.shape[:1]
            legal = legal and (rows is None or len(rows) == len(ids))
            legal = legal and lengths.min() >= 1 and lengths.max() <= ids.shape[1]
            if not legal or ids.min() < 0 or ids.max() >= manifest.facts.vocab_size:
                raise self.container.damaged(f"a call of {what!r} is none that the bundle could be given")
            rows = np.zeros(len(ids), np.int64) if rows is None else rows
            if int(rows.max()) + ids.shape[1] > manifest.max_length:
                raise self.container.damaged(f"{what!r} has more tokens than a row holds")
            rows = rows + lengths
            calls.append(Call(ids, lengths))
        if not calls or (len(calls) > 1 and manifest.task != "causal-lm"):
            raise self.container.damaged(f"{what!r} has {len(calls)} calls")
        return tuple(calls)

    def expected(self, layout: str, replay: Replay, case: Case, given: Sequence[Selections] | None) -> RecordedExpected:
        return RecordedExpected(self.container, self._cases[layout, case.name], given)

    def held_out(self, layout: str, replay: Replay, max_length: int) -> Sequence[HeldOut]:
        rows = []
        for text in self.recording.held_out.get(layout, ()):
            what = "held-out text"
            targets = self.container.read(text.targets, ("int64",), what)
            logits = StoredLogits(self.container, text.expected, what)
            vocabulary = self._manifest.facts.vocab_size
            if logits.size != vocabulary or targets.shape != (logits.count,):
                raise self.container.damaged(f"{what} has targets of {list(targets.shape)}")
            if targets.size and not (targets.min() >= 0 and targets.max() < vocabulary):
                raise self.container.damaged(f"{what} goes on with tokens that there are not")
            case = Case(what, self._calls(text.calls, what), exact=False)
            rows.append(HeldOut(case, targets, logits.distribution()))
        if not rows:
            raise self.container.damaged(f"it has no held-out text of the {layout} layout")
        return rows


class StoredLogits:
    """Logits `[T, V]`, maybe in part: what a container holds of them.

    Args:
        container: the file.
        recorded: which of its tensors.
        what: they are, for messages.

    Raises:
        UnsupportedModelError: tensors do not fit each other.
    """

    def __init__(self, container: Container, recorded: RecordedLogits, what: str) -> None:
        if len(recorded.shape) != 3 or recorded.shape[0] != 1 or 0 in recorded.shape:
            raise container.damaged(f"{what} has the shape {list(recorded.shape)}")
        _, self.count, self.size = recorded.shape
        self.step = recorded.step
        known = self.size // self.step if self.step > 1 else self.size
        values = container.read(recorded.values, FLOATS, what)
        if not known or values.shape != (self.count * known,) or (self.step > 1) != (recorded.likeliest is not None):
            raise container.damaged(f"{what} has {values.size} numbers where {self.count * known} belong")
        self.values: Array = values.reshape(self.count, known)
        self.likeliest: tuple[Array, Array, Array] | None = None
        if recorded.likeliest is not None:
            ids = container.read(recorded.likeliest.ids, ("int32",), what).astype(np.int64)
            logits = container.read(recorded.likeliest.logits, FLOATS, what)
            normalizer = container.read(recorded.likeliest.normalizer, ("float64",), what)
            fits = ids.shape == logits.shape == (self.count, *ids.shape[1:]) and normalizer.shape == (self.count,)
            if not fits or ids.ndim != 2 or not ids.size or not (ids.min() >= 0 and ids.max() < self.size):
                raise container.damaged(f"the likeliest tokens of {what} do not fit")
            self.likeliest = ids, logits, normalizer

    @cached_property
    def ids(self) -> Array:
        """`[T, m]`: which logits are held, the likeliest tokens last."""
        if self.likeliest is None:
            return np.broadcast_to(np.arange(self.size), (self.count, self.size))
        columns = np.arange(self.count)[None]
        return np.concatenate((places(columns, self.size, self.step)[0], self.likeliest[0]), axis=1)

    @cached_property
    def logits(self) -> Array:
        """`[T, m]`."""
        return self.values if self.likeliest is None else np.concatenate((self.values, self.likeliest[1]), axis=1)

    def distribution(self, positions: Array | None = None) -> Distribution:
        """Of all positions, or of some. Tokens that stand at their places stand for all that are not held."""
        chosen = np.arange(self.count) if positions is None else positions
        logits = self.logits[chosen].astype(np.float64)
        if self.likeliest is None:
            return Distribution.whole(logits)
        top = self.likeliest[0][chosen]
        spread = self.ids[chosen, : self.values.shape[1]]
        alone = np.stack([~np.isin(some, known) for some, known in zip(spread, top, strict=True)])
        weight = (self.size - top.shape[1]) / np.maximum(alone.sum(axis=1, keepdims=True), 1)
        weights = np.concatenate((alone * weight, np.ones(top.shape)), axis=1)
        return Distribution(self.ids[chosen], logits, weights, self.likeliest[2][chosen])


FLOATS = ("float32", "float16", "bfloat16")
"""What numbers of a reference are stored as: the dtype of the bundle."""


class RecordedExpected(Expected):
    """One case of a file.

    Args:
        container: the file.
        recorded: the case.
        given: the bundle's selections, where it shows any.
    """

    def __init__(self, container: Container, recorded: RecordedCase, given: Sequence[Selections] | None) -> None:
        self.container, self.recorded = container, recorded
        self.gap = float("inf") if recorded.gap is None else recorded.gap
        self.epsilon, self.violation = recorded.epsilon, {}
        self.differing = 0 if given is None else self._differing(given)

    def _differing(self, given: Sequence[Selections]) -> int:
        count = 0
        for call, selections in zip(self.recorded.calls, given, strict=True):
            for name, digest in call.choices.items():
                own = self.container.read(digest, ("uint64",), f"{name} of {self.recorded.name!r}")
                shown = own != 0
                if name not in selections or selections[name].shape[: own.ndim] != own.shape:
                    count += int(shown.sum())  # it shows nothing, or something else
                    continue
                count += int((shown & (digests_of(name, selections[name]) != own)).sum())
        return count

    def followed(self) -> RecordedExpected:
        return self

    @cached_property
    def _output(self) -> StoredLogits:
        stored = StoredLogits(self.container, self.recorded.output, f"the output of {self.recorded.name!r}")
        if sum(self.recorded.output_rows) != stored.count:
            raise self.container.damaged(f"the output of {self.recorded.name!r} has {stored.count} positions")
        return stored

    def difference(self, name: str, found: CandidateTrace) -> Difference:
        if name not in found.present:
            return self._output_difference(found.logits)
        recorded = self.recorded.present.get(name)
        if recorded is None:
            raise self.container.damaged(f"{self.recorded.name!r} has no {name}")
        return self._tensor_difference(name, recorded, found)

    def _output_difference(self, logits: Sequence[Array]) -> Difference:
        stored, ids = self._output, self._output.ids
        ends = np.cumsum(self.recorded.output_rows)
        parts = [slice(end - count, end) for end, count in zip(ends, self.recorded.output_rows, strict=True)]
        rows = [np.take_along_axis(row, ids[part], axis=1) for row, part in zip(logits, parts, strict=True)]
        result = difference(rows, [stored.logits[part] for part in parts])
        row, position, place = (*result.worst_index, 0, 0)[:3]
        return _at(result, (row, position, int(ids[parts[row]][position, place])))

    def _tensor_difference(self, name: str, recorded: RecordedTensor, found: CandidateTrace) -> Difference:
        expected = self._values(name, recorded)
        columns = [columns_of(row) for row in expected]
        if found.positions:  # the bundle holds some of the tokens
            columns = found.positions[int(name.split(".")[1])]
            expected = [
                np.take_along_axis(row, kept[..., None], axis=1) for row, kept in zip(expected, columns, strict=True)
            ]
        rows = found.present[name]
        shapes = [(*kept.shape, shape[-1]) for kept, shape in zip(columns, recorded.shapes, strict=True)]
        if [row.shape for row in rows] != shapes:
            raise ValueError(f"{name}: candidate {[row.shape for row in rows]}, reference {shapes}")
        if recorded.step == 1:
            return difference(rows, expected)
        picked = [held(row, recorded.step, kept) for row, kept in zip(rows, columns, strict=True)]
        result = difference(picked, expected)
        if len(result.worst_index) != 4:
            return result
        row, head, vector, place = result.worst_index
        channel = places(columns[row], rows[row].shape[-1], recorded.step)[head, vector, place]
        return _at(result, (row, head, vector, int(channel)))

    def _values(self, name: str, recorded: RecordedTensor) -> list[Array]:
        """Per row `[H, n, c]`."""
        what = f"{name} of {self.recorded.name!r}"
        values = self.container.read(recorded.values, FLOATS, what)
        if any(len(shape) != 3 or shape[-1] < recorded.step for shape in recorded.shapes):
            raise self.container.damaged(f"{what} has the shapes {[list(shape) for shape in recorded.shapes]}")
        shapes = [(*shape[:2], shape[-1] // recorded.step) for shape in recorded.shapes]
        sizes = [int(np.prod(shape)) for shape in shapes]
        if values.shape != (sum(sizes),):
            raise self.container.damaged(f"{what} has {values.size} numbers where {sum(sizes)} belong")
        parts = np.split(values, np.cumsum(sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def noise(self, name: str, *, more: bool) -> Noise:
        if name not in self.recorded.present:
            return _noise(self.recorded.output_more if more else self.recorded.output_noise)
        recorded = self.recorded.present[name]
        return _noise(recorded.more if more else recorded.noise)

    def distribution(self, positions: str) -> Distribution:
        chosen = np.cumsum(self.recorded.output_rows) - 1 if positions == "last" else None
        return self._output.distribution(chosen)


def _at(found: Difference, index: tuple[int, ...]) -> Difference:
    """The same difference with the index that its worst place has in the whole tensor."""
    return replace(found, worst_index=index)


def _noise(recorded: RecordedNoise) -> Noise:
    return Noise(recorded.max_abs, recorded.rms, recorded.scale, recorded.effective, recorded.draws)

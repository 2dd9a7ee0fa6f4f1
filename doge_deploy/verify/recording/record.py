"""Make a recording: run the reference on the cases of `verify` and keep what a judge reads.

Axes: B rows, H heads, n tokens that a row holds, D numbers of a vector, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from doge_deploy import __version__
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.config.model import DogeFacts
from doge_deploy.errors import MismatchError, UnsupportedModelError
from doge_deploy.graph.weight_formats import format_of
from doge_deploy.verify.cases import GREEDY, NATURAL, SEEDS, Call, Case, Limits, chunk, exact_case, natural_case
from doge_deploy.verify.compare import Array
from doge_deploy.verify.live import LiveExpected, LiveOracle
from doge_deploy.verify.noise import Noise, noise_of
from doge_deploy.verify.oracle import HeldOut
from doge_deploy.verify.parity import OUTPUTS, make_replay
from doge_deploy.verify.recording.container import Tensors, write_container
from doge_deploy.verify.recording.places import (
    CACHE_NUMBERS,
    LOGIT_NUMBERS,
    columns_of,
    held,
    places,
    step_for,
)
from doge_deploy.verify.recording.schema import (
    KIND,
    Likeliest,
    RecordedCall,
    RecordedCase,
    RecordedLogits,
    RecordedNoise,
    RecordedSelf,
    RecordedTensor,
    RecordedText,
    Recording,
)
from doge_deploy.verify.recording.subject import subject_of
from doge_deploy.verify.recording.weights import hash_weights
from doge_deploy.verify.reference import ReferenceRows
from doge_deploy.verify.reference_run import ReplayTrace, run_reference
from doge_deploy.verify.replay import Choices, Replay
from doge_deploy.verify.source import open_reference

LIKELIEST = 256
"""Tokens of each position that are held with their logits where the others are held in part."""

MORE_SEEDS = (*SEEDS, *range(400, 1600, 100))
"""Tried in turn until the reference's choices are clear: no case is judged by certificate later."""

SHORTEST = 4
"""Tokens: text that goes on is halved, if need be, until the choices in it are clear, but no further than that."""


def record(
    path: str | Path,
    output: Path,
    *,
    reference: str | None = None,
    adapter: str | None = None,
    layouts: tuple[str, ...] = (),
    greedy_steps: int = 128,
    started: Callable[[str], None] = lambda what: None,
) -> tuple[Recording, str]:
    """Write a recording of a bundle's reference; the bundle itself is not run.

    Args:
        path: the bundle.
        output: the file.
        reference: the checkpoint it came from; where None, what the bundle itself names.
        adapter: the PEFT adapter that was merged into it; where None, what the bundle itself names.
        layouts: which of its layouts; all where empty.
        greedy_steps: tokens of the greedy case, fewer where the bundle holds fewer.
        started: told what is about to be done.

    Returns:
        What was written, and the sha256 of all of it.

    Raises:
        BrokenBundleError, UnsupportedModelError: bundle or checkpoint is broken, they do not belong together, or the
            reference's choices are clear in no case.
        MismatchError: the bundle's weights are not those of the checkpoint.
        UsageError: the bundle does not say where it came from and no reference was given, or the file cannot be
            written.
    """
    bundle = open_bundle(path)
    for layout in layouts:
        bundle.layout(layout)
    checkpoint = open_reference(bundle, reference, adapter)
    oracle = LiveOracle(bundle, checkpoint, greedy_steps=greedy_steps, started=started)
    started("compare weights")
    weights = oracle.weights(bundle)
    if not weights.passed:
        raise MismatchError(f"{bundle.path} does not hold the checkpoint's weights: {weights.failures[0]}")
    chosen = layouts or tuple(bundle.manifest.layouts)
    with _one_thread():
        recorder = Recorder(bundle, oracle, greedy_steps, started)
        recording = recorder.recording(chosen)
    if not recording.cases:
        raise UnsupportedModelError(
            f"{bundle.path}: nothing can be recorded: {next(iter(recording.left_out.values()))}; verify it with its "
            f"reference available"
        )
    started(f"write {output}")
    return recording, write_container(output, KIND, asdict(recording), recorder.tensors)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of several threads depend on how many there are; a recording should not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Recorder:
    """Runs the cases and collects tensors.

    Args:
        bundle: whose reference it is.
        oracle: that reference.
        greedy_steps: see `record`.
        started: told what is about to be done.
    """

    def __init__(self, bundle: Bundle, oracle: LiveOracle, greedy_steps: int, started: Callable[[str], None]) -> None:
        self.bundle, self.oracle, self.greedy_steps, self.started = bundle, oracle, greedy_steps, started
        self.tensors = Tensors()
        self.dtype = bundle.manifest.dtype
        self._runs: dict[tuple[object, ...], tuple[LiveExpected, list[Choices]]] = {}

    def recording(self, layouts: Sequence[str]) -> Recording:
        """All of it."""
        manifest, oracle = self.bundle.manifest, self.oracle
        held_out = self._held_out(layouts)
        itself = oracle.itself()
        cases, left_out = [], {}
        for name in oracle.case_names():
            self.started(f"record {name}")
            oracle.forget()
            self._runs.clear()
            for layout in layouts:
                found = self._case(layout, name)
                if isinstance(found, str):
                    left_out[f"{layout}/{name}"] = found
                else:
                    cases.append(found)
        listed = {name: dict(entry) for name, entry in sorted(manifest.files.items())}
        return Recording(
            subject=subject_of(manifest),
            reference=oracle.name,
            made_with={
                "doge-deploy": __version__,
                **{name: metadata.version(name) for name in ("numpy", "torch", "transformers")},
            },
            bundle=hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest(),
            weights=hash_weights(self.bundle.path),
            itself=None if itself is None else RecordedSelf(itself.prefill_against_decode, itself.scale),
            layouts=tuple(layouts),
            names=tuple(oracle.case_names()),
            left_out=left_out,
            cases=tuple(cases),
            held_out=held_out,
        )

    def _replay(self, layout: str) -> Replay:
        return make_replay(self.bundle.manifest, layout, last_logits=self.bundle.manifest.last_logits)

    def _selects(self, layout: str, case: Case) -> bool:
        facts: DogeFacts = self.bundle.manifest.facts
        chooses = facts.is_moe or self.bundle.layout(layout).keep_window
        return chooses and (facts.is_moe or facts.keep_window(case.longest))

    def _case(self, layout: str, name: str) -> RecordedCase | str:
        """A case in which the reference's choices are clear, or why there is none."""
        replay = self._replay(layout)
        for case in self._candidates(layout, replay, name):
            selects = self._selects(layout, case)
            expected, choices = self._run(replay, case, selects)
            if not selects or expected.gap > max(expected.epsilon.values(), default=0.0):
                return self._recorded(layout, case, expected, choices, selects)
        return "the reference's own selections lie within its noise in every text that was tried"

    def _candidates(self, layout: str, replay: Replay, name: str) -> Iterator[Case]:
        """Texts of a case, those first that a live verification would take."""
        limits = self.oracle.limits
        if name in (NATURAL, GREEDY):
            yield from self._texts(layout, replay, name)
            return
        first = exact_case(limits, SEEDS[0], name)
        if not self._selects(layout, first):
            yield first
            return
        cases = [exact_case(limits, seed, name) for seed in SEEDS]
        yield max(cases, key=lambda case: self._run(replay, case, True)[0].gap)
        for seed in MORE_SEEDS[len(SEEDS) :]:
            yield exact_case(limits, seed, name)

    def _texts(self, layout: str, replay: Replay, name: str) -> Iterator[Case]:
        """Text that repeats tokens, whose scores tie: no longer than the window, and shorter if experts tie."""
        facts, limits = self.bundle.manifest.facts, self.oracle.limits
        most = limits.max_length
        if self.bundle.layout(layout).keep_window and facts.keep_window(most):
            most = min(most, facts.keep_window_size)
        while True:
            bounds = Limits(limits.vocab_size, most, facts.keep_window_size, task=limits.task)
            if name == NATURAL:
                yield natural_case(bounds, self.oracle.text_ids)
            else:
                yield self._greedy(replay, most)
            if most <= SHORTEST:
                return
            # natural text never had more than 96 tokens here, greedy text no more than its steps
            most = max(SHORTEST, min(most, 128) // 2)

    def _greedy(self, replay: Replay, most: int) -> Case:
        """The reference's own greedy text of at most so many tokens, prompt included."""
        prompt = np.resize(self.oracle.text_ids, min(16, max(1, most // 2)))
        rows = ReferenceRows(self.oracle.references.same, 1, "right")
        first = [[1]] * len(prompt) if replay.tokenwise else [[len(prompt)]]
        for call in chunk([prompt], first):
            logits, _ = rows.run(call.input_ids, call.lengths)
        calls = list(chunk([prompt], [[len(prompt)]]))
        for _ in range(min(self.greedy_steps, most - len(prompt))):
            calls.append(Call(np.array([[int(logits[0][-1].argmax())]]), np.ones(1, np.int64)))
            logits, _ = rows.run(calls[-1].input_ids, calls[-1].lengths)
        return Case(GREEDY, tuple(calls), exact=False)

    def _run(self, replay: Replay, case: Case, selects: bool) -> tuple[LiveExpected, list[Choices]]:
        """The reference in both dtypes, the wider one by the choices of the other; layouts share what is equal."""
        padded = any(call.lengths.min() < call.input_ids.shape[1] for call in case.calls)
        calls = tuple((call.input_ids.tobytes(), call.lengths.tobytes()) for call in case.calls)
        key = (replay.padding if padded else "", replay.tokenwise, selects, calls)
        if key not in self._runs:
            references = self.oracle.references
            same = run_reference(replay, references.same, case, note_choices=selects)
            given = [choices.own for choices in same.choices] if selects else None
            wider = run_reference(replay, references.wider, case, given)
            self._runs[key] = LiveExpected(references, replay, case, given, same, wider), same.choices
        return self._runs[key]

    def _recorded(
        self, layout: str, case: Case, expected: LiveExpected, choices: Sequence[Choices], selects: bool
    ) -> RecordedCase:
        same = expected.same
        output = self._logits(np.concatenate(same.logits), self._continuation(case, same))
        return RecordedCase(
            name=case.name,
            layout=layout,
            exact=case.exact or selects,
            calls=self._calls(case.calls, choices),
            gap=None if np.isinf(expected.gap) else expected.gap,
            epsilon=dict(expected.epsilon) if selects else {},
            output=output.recorded,
            output_rows=tuple(len(row) for row in same.logits),
            output_noise=self._output_noise(expected, output, more=False),
            output_more=self._output_noise(expected, output, more=True),
            present={name: self._tensor(expected, name) for name in same.present},
        )

    def _calls(self, calls: Sequence[Call], choices: Sequence[Choices] = ()) -> tuple[RecordedCall, ...]:
        digests = [choice.digests() for choice in choices] or [{}] * len(calls)
        return tuple(
            RecordedCall(
                self.tensors.add(call.input_ids),
                self.tensors.add(call.lengths),
                {name: self.tensors.add(digest) for name, digest in sorted(digest_of.items())},
            )
            for call, digest_of in zip(calls, digests, strict=True)
        )

    def _continuation(self, case: Case, same: ReplayTrace) -> Array | None:
        """`[T]`: the token that follows each position of a text of one row; the likeliest where none does."""
        if self.bundle.manifest.task != "causal-lm" or case.name != GREEDY:
            return None
        likeliest = np.concatenate(same.logits).argmax(axis=1)
        text = np.concatenate([call.input_ids[0] for call in case.calls])
        follows = text[len(text) - len(likeliest) + 1 :]
        return np.concatenate((follows, likeliest[-1:]))

    def _logits(self, logits: Array, wanted: Array | None = None) -> _Logits:
        """Of `[T, V]`; `wanted` `[T]` are tokens that are held in any case."""
        shape = (1, *logits.shape)
        step = step_for([shape], LOGIT_NUMBERS)
        if step == 1:
            return _Logits(RecordedLogits(shape, 1, self.tensors.add(logits.reshape(-1), self.dtype), None), None)
        spread = places(np.arange(len(logits))[None], logits.shape[1], step)[0]
        likeliest = self._likeliest(logits, wanted)
        values = np.take_along_axis(logits, spread, axis=1)
        largest = logits.max(axis=1)
        recorded = Likeliest(
            self.tensors.add(likeliest, "int32"),
            self.tensors.add(np.take_along_axis(logits, likeliest, axis=1), self.dtype),
            self.tensors.add(largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))),
        )
        return _Logits(
            RecordedLogits(shape, step, self.tensors.add(values.reshape(-1), self.dtype), recorded),
            np.concatenate((spread, likeliest), axis=1),
        )

    @staticmethod
    def _likeliest(logits: Array, wanted: Array | None) -> Array:
        """`[T, m]`: the likeliest tokens first, `wanted` among them."""
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :LIKELIEST]
        if wanted is not None:
            missing = ~(ids == wanted[:, None]).any(axis=1)
            ids[missing, -1] = wanted[missing]
        return ids

    def _output_noise(self, expected: LiveExpected, output: _Logits, *, more: bool) -> RecordedNoise:
        """Of the numbers that are held, as the bundle's are compared there."""
        if expected.same.classes:
            return _noise(expected.noise(OUTPUTS[self.bundle.manifest.task], more=more))

        def picked(trace: ReplayTrace) -> list[Array]:
            whole = np.concatenate(trace.logits)
            return [whole if output.ids is None else np.take_along_axis(whole, output.ids, axis=1)]

        exact = picked(expected.wider)
        return _noise(noise_of([picked(draw) for draw in expected.draws(more=more)], exact))

    def _tensor(self, expected: LiveExpected, name: str) -> RecordedTensor:
        rows = expected.same.present[name]
        step = step_for([row.shape for row in rows], CACHE_NUMBERS)

        def picked(trace: ReplayTrace) -> list[Array]:
            return [held(row, step, columns_of(row)) for row in trace.present[name]]

        exact, values = picked(expected.wider), picked(expected.same)
        noise = [
            _noise(noise_of([picked(draw) for draw in expected.draws(more=more)], exact)) for more in (False, True)
        ]
        flat = np.concatenate([row.reshape(-1) for row in values])
        return RecordedTensor(tuple(row.shape for row in rows), step, self.tensors.add(flat, self.dtype), *noise)

    def _held_out(self, layouts: Sequence[str]) -> dict[str, tuple[RecordedText, ...]]:
        """Of a bundle with quantized weights: what the checkpoint's own weights make of the text."""
        if format_of(self.bundle.manifest.options) is None:
            return {}
        result = {}
        for layout in layouts:
            self.started(f"record held-out text ({layout})")
            rows = self.oracle.held_out(layout, self._replay(layout), self.bundle.manifest.max_length)
            result[layout] = tuple(self._text(row) for row in rows)
        return result

    def _text(self, row: HeldOut) -> RecordedText:
        logits = self._logits(row.expected.logits, row.targets)
        return RecordedText(self._calls(row.case.calls), self.tensors.add(row.targets), logits.recorded)


@dataclass(frozen=True)
class _Logits:
    recorded: RecordedLogits
    ids: Array | None
    """`[T, m]`: tokens whose logits are held; None for all."""


def _noise(found: Noise) -> RecordedNoise:
    return RecordedNoise(found.max_abs, found.rms, found.scale, found.effective, found.draws)

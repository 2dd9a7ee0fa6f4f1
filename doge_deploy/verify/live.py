"""The reference that runs in this process: an `Oracle` of transformers, or of a legacy Doge's own reference.

It computes each case twice, in the bundle's dtype and in the next wider one; their difference is the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType

import numpy as np

from doge_deploy.bundle.manifest import Manifest
from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.config.model import DogeFacts
from doge_deploy.graph.weight_formats import WeightFormat
from doge_deploy.runtime.base import IntArray
from doge_deploy.verify.ahead import Ahead, workers_for
from doge_deploy.verify.cases import (
    GREEDY,
    NATURAL,
    SEEDS,
    Call,
    Case,
    Limits,
    chunk,
    distinct_ids,
    exact_case,
    exact_cases,
    natural_case,
)
from doge_deploy.verify.compare import Array, Difference, Distribution, difference
from doge_deploy.verify.held_out import HELD_OUT
from doge_deploy.verify.noise import DRAWS, Noise, noise_of
from doge_deploy.verify.oracle import Expected, HeldOut, Judged, Oracle, SelfDifference, WeightsResult
from doge_deploy.verify.quality import held_out_cases, predicted
from doge_deploy.verify.reference import FEWEST_ROWS, SMALL_PARAMETERS, Reference, checkpoint_size, few_threads
from doge_deploy.verify.reference_run import ReplayTrace, run_reference
from doge_deploy.verify.replay import CandidateTrace, Replay, Selections, greedy_calls
from doge_deploy.verify.rounding import rounded_once_more
from doge_deploy.verify.stored import stored_weights, weight_format_of
from doge_deploy.verify.texts import TEXT, ids_of
from doge_deploy.verify.tolerance import WIDER, limit
from doge_deploy.verify.weights import compare_weights
from doge_deploy.verify.whole_texts import WholeTexts, run_text


@dataclass
class References:
    """transformers in a bundle's dtype and in the next wider one, with the runs of the current case."""

    same: Reference
    wider: Reference
    texts: WholeTexts | None = None
    """The wider one, where it may read a text in one call."""
    ahead: Ahead | None = None
    """What is run in other processes already."""
    _runs: dict[Hashable, ReplayTrace] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop the runs of the last case."""
        self._runs.clear()

    def key(self, reference: Reference, replay: Replay, case: Case) -> Hashable:
        """The same for runs that are the same."""
        padded = any(call.lengths.min() < call.input_ids.shape[1] for call in case.calls)
        calls = tuple((call.input_ids.tobytes(), call.lengths.tobytes()) for call in case.calls)
        return reference.dtype, replay.padding if padded else "", replay.tokenwise, replay.last_logits, calls

    def run(self, reference: Reference, replay: Replay, case: Case) -> ReplayTrace:
        """`case` on one of the two with its own selections; the same calls are run once."""
        key = self.key(reference, replay, case)
        if key not in self._runs:
            found = None if self.ahead is None else self.ahead.take(key)
            self._runs[key] = run_reference(replay, reference, case) if found is None else found
        return self._runs[key]

    def tasks(self, replay: Replay, case: Case) -> dict[Hashable, Callable[[], object]]:
        """What `run` and `run_wider` of a case in which nothing is selected would run."""
        found: dict[Hashable, Callable[[], object]] = {
            self.key(self.same, replay, case): partial(run_reference, replay, self.same, case)
        }
        asked = None if self.texts is None else self.texts.asked(replay, case)
        if asked is not None:
            found[asked] = partial(run_text, self.wider, asked)
        else:
            found[self.key(self.wider, replay, case)] = partial(run_reference, replay, self.wider, case)
        return found

    def run_wider(self, replay: Replay, case: Case) -> ReplayTrace:
        """`case` on the wider one; nothing is selected in it, or by its own choice."""
        asked = None if self.texts is None else self.texts.asked(replay, case)
        if self.texts is None or asked is None:
            return self.run(self.wider, replay, case)
        return self.texts.run(asked, self.ahead).trace(case, last=replay.last_logits)


class LiveExpected(Expected):
    """Two runs of a case.

    Args:
        references: that made them.
        replay: how.
        case: the calls.
        given: the bundle's selections, where it shows any.
        same: the run in the bundle's dtype.
        wider: the run in the wider dtype, by the bundle's selections where there are any.
    """

    def __init__(
        self,
        references: References,
        replay: Replay,
        case: Case,
        given: Sequence[Selections] | None,
        same: ReplayTrace,
        wider: ReplayTrace,
    ) -> None:
        self.references, self.replay, self.case, self.given = references, replay, case, given
        self.same, self.wider = same, wider
        self.gap, self.differing, self.violation = same.gap, same.differing, same.violation

    @cached_property
    def epsilon(self) -> dict[str, float]:  # type: ignore[override]
        """Of every layer that has a score, or a router."""
        dtype, limits = self.references.same.dtype, {}
        for layer in range(self.references.same.facts.num_hidden_layers):
            name = f"present.{layer}.score"
            noise = difference(self.same.present[name], self.wider.present[name])
            limits[f"kept.{layer}"] = limit(
                "kept", dtype, noise_max=noise.max_abs, noise_rms=noise.rms, scale=noise.scale
            ).max_abs
            if layer in self.same.router:
                noise = difference(self.same.router[layer], self.wider.router[layer])
                limits[f"experts.{layer}"] = limit(
                    "experts", dtype, noise_max=2 * noise.max_abs, noise_rms=0.0, scale=2 * noise.scale
                ).max_abs
        return limits

    def followed(self) -> LiveExpected:
        if not self.case.exact or self.given is None:
            return self  # it was computed by the bundle's selections
        same = run_reference(self.replay, self.references.same, self.case, self.given)
        followed = LiveExpected(self.references, self.replay, self.case, self.given, same, self.wider)
        followed.epsilon = self.epsilon  # noise is measured where both ran alike
        return followed

    def difference(self, name: str, found: CandidateTrace) -> Difference:
        if name not in found.present:
            return difference(found.logits, self.same.logits)
        return difference(found.present[name], found.held(name, self.same.present[name]))

    def noise(self, name: str, *, more: bool) -> Noise:
        draws = self.draws(more=more)
        if name not in self.same.present:
            # A pair of class logits is too small a sample of noise: that of every token's is taken.
            return noise_of([_of_every_token(draw) for draw in draws], _of_every_token(self.wider))
        return noise_of([draw.present[name] for draw in draws], self.wider.present[name])

    def draws(self, *, more: bool) -> list[ReplayTrace]:
        """The run in the bundle's dtype; with `more`, those with other rounding errors after it."""
        return [self.same, *(self._more if more else ())]

    @cached_property
    def _more(self) -> list[ReplayTrace]:
        return [self._draw(seed) for seed in range(DRAWS)]

    def _draw(self, seed: int) -> ReplayTrace:
        """The reference with other rounding errors, and the bundle's selections."""
        with rounded_once_more(self.references.same.model, seed):
            return run_reference(self.replay, self.references.same, self.case, self.given)

    def distribution(self, positions: str) -> Distribution:
        return Distribution.whole(self.logits(positions))

    def logits(self, positions: str) -> Array:
        """`[T, V]`, see `distribution`."""
        return np.concatenate([rows[-1:] if positions == "last" else rows for rows in self.same.logits])


def _of_every_token(trace: ReplayTrace) -> list[Array]:
    return trace.classes or trace.logits


class LiveOracle(Oracle):
    """Runs the references of one bundle.

    Args:
        bundle: what is going to be judged.
        checkpoint: the one that it came from.
        greedy_steps: tokens of the greedy case, fewer where the bundle holds fewer.
        started: told what is about to be done.
    """

    follows = True

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: Checkpoint,
        *,
        greedy_steps: int = 128,
        started: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.name = _name(bundle.manifest.facts)
        self.limits = Limits.of(self.manifest.facts, self.manifest.max_length, self.manifest.task)
        self._bundle, self._checkpoint = bundle, checkpoint
        self._greedy_steps, self._started = greedy_steps, started
        self._greedy_cases: dict[Judged, Case] = {}
        self._stack = ExitStack()

    def __enter__(self) -> LiveOracle:
        self._stack.enter_context(few_threads(self._checkpoint))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @cached_property
    def references(self) -> References:
        """With the weights as the bundle stores them, dequantized where they are quantized."""
        self._started("load the reference")
        manifest, weight_format = self.manifest, self._weight_format
        stored = {} if weight_format is None else stored_weights(self._bundle, self._checkpoint, weight_format)
        dtypes = (manifest.dtype, WIDER[manifest.dtype])
        same, wider = (Reference(self._checkpoint, dtype, manifest.task, stored) for dtype in dtypes)
        texts = WholeTexts(wider, self._unselecting()) if WholeTexts.apply(wider, self.limits) else None
        return References(same, wider, texts)

    def _unselecting(self) -> Iterator[Case]:
        """The first choice of every case, but for greedy text, in which no key is dropped."""
        cases = [*exact_cases(self.limits, SEEDS[0]), natural_case(self.limits, self.text_ids)]
        return (case for case in cases if not self.manifest.facts.keep_window(case.longest))

    def prepare(self, layouts: Sequence[Judged]) -> None:
        """Begin the runs in which nothing is selected, where there are processors and memory for several at once."""
        if checkpoint_size(self._checkpoint) < SMALL_PARAMETERS:
            return
        workers = workers_for(self._run_bytes)
        if not workers:
            return
        references, tasks = self.references, {}
        for judged in layouts:
            # greedy text first: its steps are one after the other, and would be left over at the end
            for name in sorted(self.case_names(), key=lambda name: name != GREEDY):
                case = self._planned(name, judged)
                if case is None or judged.selects(case) or judged.runners.obstacle(case) is not None:
                    continue
                tasks.update(references.tasks(judged.replay, case))
        if tasks:
            references.ahead = Ahead(tasks, workers)
            self._stack.callback(references.ahead.close)

    def _planned(self, name: str, judged: Judged) -> Case | None:
        """The case of that name, as far as it is known before any other was judged."""
        if name in (NATURAL, GREEDY):
            case = self.case(name, judged)
            return case if isinstance(case, Case) else None
        return exact_case(self.limits, SEEDS[0], name)

    @property
    def _run_bytes(self) -> int:
        """About the most that a run takes: scores of attention of the longest text in a few forms, and all logits."""
        facts, length = self.manifest.facts, self.limits.max_length
        logits = FEWEST_ROWS if self.manifest.last_logits else length
        return 8 * (6 * facts.num_attention_heads * length**2 + 2 * logits * facts.vocab_size)

    @cached_property
    def text_ids(self) -> IntArray:
        """`[T]`: natural text, repeated as needed."""
        return ids_of(self._bundle, TEXT)

    def weights(self, bundle: Bundle) -> WeightsResult:
        return compare_weights(bundle, self._checkpoint, self._weight_format)

    @cached_property
    def _weight_format(self) -> WeightFormat | None:
        return weight_format_of(self._bundle, self._checkpoint)

    def itself(self) -> SelfDifference | None:
        """The same row in one call and token by token, both in transformers."""
        if self.manifest.task != "causal-lm":
            return None
        row = distinct_ids(self.limits, min(24, self.limits.max_length), seed=0)
        replay = Replay(padding="right", tokenwise=False, last_logits=False)
        whole: tuple[Call, ...] = chunk([row], [[len(row)]])
        single = chunk([row], [[1]] * len(row))
        same = self.references.same
        a, b = (
            np.concatenate(run_reference(replay, same, Case(name, calls, exact=True)).logits)
            for name, calls in (("prefill", whole), ("decode", single))
        )
        return SelfDifference(float(np.abs(a - b).max()), float(np.abs(a).max()))

    def case_names(self) -> Sequence[str]:
        free = [NATURAL, GREEDY] if self.manifest.task == "causal-lm" else [NATURAL]
        return [*(case.name for case in exact_cases(self.limits, SEEDS[0])), *free]

    def case(self, name: str, judged: Judged) -> Case | str:
        if name == NATURAL:
            return natural_case(self.limits, self.text_ids)
        if name == GREEDY:
            return self._greedy(judged)
        return self.widest(judged, lambda seed: exact_case(self.limits, seed, name))

    def _greedy(self, judged: Judged) -> Case:
        """The bundle's own greedy text: the reference is told its tokens, and asked at each for the next."""
        if judged not in self._greedy_cases:
            self._greedy_cases[judged] = self._greedy_case(judged)
        return self._greedy_cases[judged]

    def _greedy_case(self, judged: Judged) -> Case:
        prompt = self.prompt
        steps = min(self._greedy_steps, self.limits.max_length - len(prompt))
        if judged.runners.hides_selections:
            steps = min(steps, self.limits.keep_window_size - len(prompt))
        calls = chunk([prompt], [[len(prompt)]])
        if judged.runners.obstacle(Case(GREEDY, calls, exact=False)) is None and steps > 0:
            calls = greedy_calls(judged.runners.plain, prompt, steps)
        return Case(GREEDY, calls, exact=False)

    @property
    def prompt(self) -> IntArray:
        """`[T]`: what greedy text continues."""
        return np.resize(self.text_ids, min(16, max(1, self.limits.max_length // 2)))

    def widest(self, judged: Judged, make: Callable[[int], Case]) -> Case:
        """The case of that seed on which the reference's choices are clearest."""
        first = make(SEEDS[0])
        if not judged.selects(first):
            return first
        cases = [first, *(make(seed) for seed in SEEDS[1:])]
        return max(cases, key=lambda case: self.references.run(self.references.same, judged.replay, case).gap)

    def expected(self, layout: str, replay: Replay, case: Case, given: Sequence[Selections] | None) -> LiveExpected:
        references = self.references
        if given is None:
            runs = [references.run(references.same, replay, case), references.run_wider(replay, case)]
        else:
            runs = [
                run_reference(replay, references.same, case, given, use_given=not case.exact),
                run_reference(replay, references.wider, case, given),
            ]
        return LiveExpected(references, replay, case, given, *runs)

    def held_out(self, layout: str, replay: Replay, max_length: int) -> Sequence[HeldOut]:
        rows = []
        for case, row in held_out_cases(self._held_out_ids, max_length):
            logits, targets = predicted(row, run_reference(replay, self._unquantized, case).logits)
            rows.append(HeldOut(case, targets, Distribution.whole(logits)))
        return rows

    @cached_property
    def _held_out_ids(self) -> IntArray:
        return ids_of(self._bundle, HELD_OUT)

    @cached_property
    def _unquantized(self) -> Reference:
        """With the checkpoint's own weights."""
        self._started("load the reference")
        return Reference(self._checkpoint, self.manifest.dtype, self.manifest.task)

    def forget(self) -> None:
        self.references.forget()
        self.__dict__.pop("_unquantized", None)  # quality is judged before the cases


def _name(facts: DogeFacts) -> str:
    return f"the reference of legacy Doges ({facts.revision})" if facts.is_legacy else "transformers"

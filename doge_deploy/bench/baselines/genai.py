"""onnxruntime-genai on a growing bundle: the graph that this tool lowered for ONNX Runtime, in another loop.

Reference: `Generator` and `GeneratorParams` of onnxruntime-genai's Python API, 0.18; src/python/python.cpp there.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from doge_deploy.bench.baselines.catalog import LeftOut, Wanted
from doge_deploy.bench.baselines.growing import growing_bundle
from doge_deploy.bench.candidates import Candidate, weights_of
from doge_deploy.bundle.opening import Bundle
from doge_deploy.runtime.base import FloatArray, IntArray, Runner

LIBRARIES = ("onnxruntime_genai",)


def candidates(wanted: Wanted) -> list[Candidate]:
    """One for each way in which the bundles store their weights."""
    return growing_candidates("genai", wanted, rows=1)


def growing_candidates(kind: str, wanted: Wanted, rows: int | None = None) -> list[Candidate]:
    """A growing bundle for each way in which the bundles store their weights, as candidates of a kind.

    Raises:
        LeftOut: there is none, and none can be made.
        DogeDeployError: one cannot be exported.
    """
    first: dict[str, Bundle] = {}
    for bundle in wanted.bundles:
        first.setdefault(weights_of(bundle), bundle)
    made = []
    for weights, bundle in first.items():
        if bundle.manifest.dtype != "float32":
            raise LeftOut(f"{kind} is timed in float32 alone, and the bundle computes in {bundle.manifest.dtype}")
        made.append(
            Candidate(
                name=kind if len(first) == 1 else f"{kind} {weights}",
                kind=kind,
                path=str(growing_bundle(wanted, bundle)),
                dtype=bundle.manifest.dtype,
                max_length=bundle.manifest.max_length,
                vocab_size=bundle.manifest.facts.vocab_size,
                last_logits=bundle.manifest.last_logits,
                weights=weights,
                rows=rows,
            )
        )
    return made


def open_runner(candidate: Candidate, threads: int) -> GenaiRunner:
    """The bundle's graph in a session of onnxruntime-genai."""
    import onnxruntime_genai as genai

    config = genai.Config(candidate.path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return GenaiRunner(genai.Model(config), max_length=candidate.max_length, last_logits=candidate.last_logits)


class GenaiRunner(Runner):
    """One text; tokens that are given go in where a generator would choose them. It cannot go on with a batch."""

    def __init__(self, model: Any, *, max_length: int, last_logits: bool) -> None:
        super().__init__(max_length=max_length, last_logits=last_logits)
        self._model = model

    def _reset(self, batch_size: int) -> None:
        import onnxruntime_genai as genai

        parameters = genai.GeneratorParams(self._model)
        length = self.max_length
        parameters.set_search_options(do_sample=False, min_length=length, max_length=length, batch_size=batch_size)
        self._generator = genai.Generator(self._model, parameters)

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        self._generator.append_tokens(input_ids.astype(np.int32))
        logits: FloatArray = self._generator.get_logits()
        return logits

    def cache(self) -> dict[str, list[FloatArray]]:
        """Nothing: it shows none."""
        return {}

"""OpenVINO on the standard graph of a growing bundle, its caches made states of the model.

Reference: https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-request/stateful-models.html
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doge_deploy.bench.baselines.catalog import Wanted
from doge_deploy.bench.baselines.genai import growing_candidates
from doge_deploy.bench.candidates import Candidate
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.base import FloatArray, IntArray, Runner

LIBRARIES = ("openvino", "openvino._offline_transformations")


def candidates(wanted: Wanted) -> list[Candidate]:
    """One for each way in which the bundles store their weights."""
    return growing_candidates("openvino", wanted)


def open_runner(candidate: Candidate, threads: int) -> OpenvinoRunner:
    """The bundle's standard graph, compiled for the processor, computing in float32 as the bundle does."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    bundle = open_bundle(candidate.path, check="quick")
    layout = bundle.layout("growing")
    model = openvino.Core().read_model(bundle.path / layout.file)
    apply_make_stateful_transformation(model, {past.name: present.name for past, present in layout.signature.past()})
    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # its own choice may be lower than the graph's
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return OpenvinoRunner(compiled, max_length=candidate.max_length, last_logits=candidate.last_logits)


class OpenvinoRunner(Runner):
    """One request of a compiled model; its states are the caches."""

    def __init__(self, compiled: Any, *, max_length: int, last_logits: bool) -> None:
        super().__init__(max_length=max_length, last_logits=last_logits)
        self._request = compiled.create_infer_request()

    def _reset(self, batch_size: int) -> None:
        import openvino

        for state in self._request.query_state():
            _, heads, _, size = state.state.shape
            state.state = openvino.Tensor(np.zeros((batch_size, heads, 0, size), np.float32))

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        batch, width = input_ids.shape
        held = int(self.row_lengths[0])
        feeds = {
            "input_ids": input_ids,
            "attention_mask": np.ones((batch, held + width), np.int64),
            "position_ids": np.tile(np.arange(held, held + width), (batch, 1)),
        }
        logits: FloatArray = self._request.infer(feeds, share_inputs=True)["logits"]
        return logits

    def cache(self) -> dict[str, list[FloatArray]]:
        """By the names of present tensors, which end those that OpenVINO gives to states."""
        states = {"present." + state.name.rpartition("present.")[2]: state for state in self._request.query_state()}
        return {name: list(state.state.data) for name, state in states.items()}

"""Milliseconds of a decode step in onnxruntime-genai, and of the same graph alone: python genai_parts.py BUNDLE...

For bundles with a growing graph, after a prompt of 128. The cases take turns in one process:

- "generate_next_token": what a user calls; it chooses a token too;
- "append_tokens": the same call of the graph with a given token;
- "graph": the graph in a session of onnxruntime with genai's settings (its threads, its own spinning), on caches of as
  many slots that are bound once;
- "graph, spinning 50 us": the same as this package opens it.

What the first two take beyond "graph" is genai's own work for each token.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai as genai

PROMPT, STEPS, ROUNDS = 128, 48, 9
SLOTS = PROMPT + STEPS + 8

Step = Callable[[], object]


class Generated:
    """A text in onnxruntime-genai."""

    def __init__(self, bundle: Path, call: str) -> None:
        self._model, self._call = genai.Model(str(bundle)), call

    def start(self) -> Step:
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, min_length=SLOTS, max_length=SLOTS, batch_size=1)
        generator = genai.Generator(self._model, parameters)
        generator.append_tokens(np.arange(3, 3 + PROMPT, dtype=np.int32)[None])
        if self._call == "append_tokens":
            return lambda: generator.append_tokens(np.full((1, 1), 7, np.int32))
        generator.generate_next_token()  # chooses from the prompt's logits, without the graph
        return generator.generate_next_token


class Graph:
    """The graph that genai_config.json names, its caches bound in place."""

    def __init__(self, bundle: Path, spin: int | None) -> None:
        decoder = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]
        options = onnxruntime.SessionOptions()
        if spin is not None:
            options.intra_op_num_threads = len(os.sched_getaffinity(0))
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin))
        self._session = onnxruntime.InferenceSession(str(bundle / decoder["filename"]), options)
        shape = (1, decoder["num_key_value_heads"], SLOTS, decoder["head_size"])
        self._names = [
            (decoder["inputs"][f"past_{kind}_names"] % layer, decoder["outputs"][f"present_{kind}_names"] % layer)
            for layer in range(decoder["num_hidden_layers"])
            for kind in ("key", "value")
        ]
        self._caches = [np.zeros(shape, np.float32) for _ in self._names]
        self._binding: Any = self._session.io_binding()
        for (past, present), cache in zip(self._names, self._caches, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(cache)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)

    def _run(self, ids: Any, held: int) -> None:
        width = ids.shape[1]
        self._binding.bind_cpu_input("input_ids", ids)
        self._binding.bind_cpu_input("attention_mask", np.ones((1, held + width), np.int64))
        self._binding.bind_cpu_input("position_ids", np.arange(held, held + width)[None])
        self._binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(self._binding)

    def start(self) -> Step:
        self._run(np.arange(3, 3 + PROMPT)[None], 0)
        held = PROMPT

        def step() -> None:
            nonlocal held
            self._run(np.full((1, 1), 7), held)
            held += 1

        return step


def step_ms(step: Step) -> float:
    step()
    times = []
    for _ in range(STEPS):
        start = perf_counter()
        step()
        times.append(perf_counter() - start)
    return 1000 * statistics.median(times)


def main(bundles: list[str]) -> None:
    for name in bundles:
        bundle = Path(name)
        cases: dict[str, Any] = {
            "generate_next_token": Generated(bundle, "generate_next_token"),
            "append_tokens": Generated(bundle, "append_tokens"),
            "graph": Graph(bundle, None),
            "graph, spinning 50 us": Graph(bundle, 50),
        }
        found: dict[str, list[float]] = {case: [] for case in cases}
        for number in range(ROUNDS):
            order = list(cases)[:: 1 if number % 2 else -1]
            for case in order:
                sleep(0.1)
                found[case].append(step_ms(cases[case].start()))
        for case, times in found.items():
            ratios = [a / b for a, b in zip(times, found["graph"], strict=True)]
            ratio = f"{statistics.median(times) / statistics.median(found['graph']):.2f} times the graph"
            print(f"{name} {case}: {statistics.median(times):.3f} ms, {ratio} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(sys.argv[1:])

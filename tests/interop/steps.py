"""Milliseconds of a decode step after a prompt of 128: of the growing graph in onnxruntime-genai, or in our runner.

    python steps.py genai|static|growing BUNDLE...

For bundles that hold both layouts; `nox -s interop-genai -- BUNDLE...` runs the three in turns, each in the environment
that it needs, and prints their ratios.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np

PROMPT, STEPS, TEXTS = 128, 64, 5


def genai_steps(bundle: Path) -> Iterator[Callable[[], object]]:
    import onnxruntime_genai as genai

    model = genai.Model(str(bundle))
    ids = np.arange(3, 3 + PROMPT, dtype=np.int32)[None]
    for _ in range(TEXTS):
        parameters = genai.GeneratorParams(model)
        length = PROMPT + 1 + STEPS  # as long as may be, whatever token comes
        parameters.set_search_options(do_sample=False, min_length=length, max_length=length, batch_size=1)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids)
        generator.generate_next_token()
        yield generator.generate_next_token


def our_steps(bundle: Path, layout: str) -> Iterator[Callable[[], object]]:
    from doge_deploy.bundle.opening import open_bundle
    from doge_deploy.runtime.ort import open_runner

    runner = open_runner(open_bundle(bundle), layout)
    for _ in range(TEXTS):
        runner.reset(1)
        logits = runner.run(np.arange(3, 3 + PROMPT)[None])

        def step() -> None:
            nonlocal logits
            logits = runner.run(logits[:, -1].argmax(-1)[:, None])

        step()
        yield step


def step_ms(step: Callable[[], object]) -> float:
    times = []
    for _ in range(STEPS):
        start = perf_counter()
        step()
        times.append(perf_counter() - start)
    return 1000 * statistics.median(times)


def main(what: str, bundles: list[str]) -> None:
    found = {}
    for name in bundles:
        steps = genai_steps(Path(name)) if what == "genai" else our_steps(Path(name), what)
        found[name] = [step_ms(step) for step in steps]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

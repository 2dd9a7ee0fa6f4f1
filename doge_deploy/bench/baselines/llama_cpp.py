"""llama.cpp, through llama-cpp-python, on a random Llama of the checkpoint's shape: another model of that size.

llama.cpp does not know Doge. What it needs for a model of the same shape, in weights of as many bits, is what somebody
would get who chose another model to be able to use it.
Reference: include/llama.h of ggml-org/llama.cpp.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.bench.baselines.catalog import LeftOut, Wanted
from doge_deploy.bench.baselines.llama_gguf import BLOCK, TYPES, shapes, write_gguf
from doge_deploy.bench.candidates import Candidate, weights_of
from doge_deploy.config.model import DogeFacts
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.runtime.base import FloatArray, IntArray, Runner

LIBRARIES = ("llama_cpp",)

_VERSION = 1
"""Of the files: a change makes old ones unused."""

_CALL = 2048
"""Tokens that llama.cpp takes at once, its own default; it computes 512 of them together."""


def candidates(wanted: Wanted) -> list[Candidate]:
    """One for each way in which the bundles store their weights.

    Raises:
        LeftOut: llama.cpp has no Llama of that shape, or no such weights.
    """
    facts = wanted.checkpoint.facts
    if facts.is_moe:
        raise LeftOut("llama.cpp: no Llama has the shape of a mixture of such experts")
    found: dict[str, Candidate] = {}
    for bundle in wanted.bundles:
        manifest, weights = bundle.manifest, weights_of(bundle)
        kind = TYPES.get(weights)
        if kind is None:
            raise LeftOut(f"llama.cpp: weights in {weights} have no counterpart; {', '.join(TYPES)} have one")
        if kind.startswith("Q") and any(inputs % BLOCK for _, inputs in shapes(facts).values()):
            raise LeftOut(f"llama.cpp: {kind} needs rows of a multiple of {BLOCK} numbers")
        found[weights] = Candidate(
            name=f"llama.cpp {kind}",
            kind="llama.cpp",
            path=str(_file(wanted, facts, kind)),
            dtype=kind,
            max_length=manifest.max_length,
            vocab_size=facts.vocab_size,
            last_logits=manifest.last_logits,
            weights=weights,
            same_model=False,
        )
    return list(found.values())


def _file(wanted: Wanted, facts: DogeFacts, kind: str) -> Path:
    key = {"version": _VERSION, "facts": facts.to_json(), "kind": kind}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = wanted.cache / f"llama-{kind}-{digest[:24]}.gguf"
    if not path.is_file():
        wanted.started(f"write a random Llama in {kind} (kept for next time)")
        wanted.make("llama_cpp", {"output": str(path), "facts": facts.to_json(), "kind": kind})
    return path


def make(output: str, facts: dict[str, Any], kind: str) -> None:
    """`write_gguf` of plain values."""
    write_gguf(Path(output), DogeFacts.from_json(facts), kind)


def open_runner(candidate: Candidate, threads: int) -> LlamaCppRunner:
    """The file, and a context for one row.

    Raises:
        UnsupportedModelError: llama.cpp refuses the file.
    """
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *message: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(candidate.path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise UnsupportedModelError(f"llama.cpp: {candidate.path} cannot be loaded")
    runner = LlamaCppRunner(model, candidate.vocab_size, threads, candidate.max_length, candidate.last_logits)
    runner.silent = silent  # the library keeps the function's address
    runner.reset(1)
    return runner


class LlamaCppRunner(Runner):
    """A context with a sequence for each row, its caches in llama.cpp's own default, float16."""

    silent: Any = None

    def __init__(self, model: Any, vocab_size: int, threads: int, max_length: int, last_logits: bool) -> None:
        super().__init__(max_length=max_length, last_logits=last_logits)
        self._model, self._vocab_size, self._threads = model, vocab_size, threads
        self._context: Any = None
        self._batch: Any = None
        self._rows = 0
        self._shape = (0, 0)

    def _reset(self, batch_size: int) -> None:
        import llama_cpp

        if batch_size == self._rows:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = batch_size * self.max_length
        parameters.n_batch = min(_CALL, parameters.n_ctx)
        parameters.n_seq_max = batch_size
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise UnsupportedModelError(f"llama.cpp: there is no memory for {parameters.n_ctx} tokens")
        self._batch = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)
        self._rows, self._shape, self._limit = batch_size, (0, 0), int(parameters.n_batch)

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        rows, width = input_ids.shape
        step = max(1, self._limit // rows)
        held = self.row_lengths[:, None]
        parts = [
            self._call(input_ids[:, start : start + step], held + np.arange(start, min(start + step, width)))
            for start in range(0, width, step)
        ]
        return parts[-1] if self.last_logits else np.concatenate(parts, axis=1)

    def _call(self, input_ids: IntArray, positions: IntArray) -> FloatArray:
        """Logits of a call of at most `_limit` tokens, `[B, 1 or Q, V]`."""
        import llama_cpp

        rows, width = input_ids.shape
        batch, count = self._batch, rows * width
        if self._shape != (rows, width):
            self._shape = rows, width
            batch.n_tokens = count
            for place in range(count):
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = place // width
                batch.logits[place] = not self.last_logits or (place + 1) % width == 0
            self._tokens = np.ctypeslib.as_array(batch.token, (count,))
            self._positions = np.ctypeslib.as_array(batch.pos, (count,))
        self._tokens[:] = input_ids.ravel()
        self._positions[:] = positions.ravel()
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise UnsupportedModelError(f"llama.cpp: a call of {count} tokens failed with status {status}")
        wanted = 1 if self.last_logits else width
        pointer = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        logits: FloatArray = np.ctypeslib.as_array(pointer, (rows, wanted, self._vocab_size)).copy()
        return logits

    def cache(self) -> dict[str, list[FloatArray]]:
        """Nothing: it is another model's."""
        return {}

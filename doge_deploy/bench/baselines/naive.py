"""A plain export of transformers' model: what you get without this tool.

`torch.onnx.export` of `DogeForCausalLM` with its defaults, a growing cache as inputs and outputs, run by ONNX Runtime
with I/O binding so that the caches are not copied through NumPy. Two things had to be decided for it:

- RoPE of type "dynamic" cannot be traced (transformers branches on the largest position). It is exported as "default",
  which has the same angles up to the original length; longer rows are refused.
- The trace freezes transformers' branch on `keep_window_size`, so a row must not exceed it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.bench.baselines.catalog import Wanted
from doge_deploy.bench.candidates import Candidate
from doge_deploy.config.model import DogeFacts
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.runtime.base import FloatArray, IntArray, Runner
from doge_deploy.runtime.ort import open_session

LIBRARIES = ("onnxruntime",)
MODEL_FILE = "model.onnx"
_VERSION = 1
"""Of the export below: a change of it makes old files unused."""

_EXAMPLE = {"batch": 2, "new": 3, "past": 5}
"""Sizes that differ from each other and from 0 and 1, which torch.export would specialise on."""


def naive_max_length(facts: DogeFacts) -> int:
    """Tokens up to which a plain export is right."""
    lengths = (facts.keep_window_size, facts.stateless_length or facts.max_position_embeddings)
    return min(lengths)


def candidates(wanted: Wanted) -> list[Candidate]:
    """The plain export of the checkpoint, which is made where there is none yet."""
    manifest, facts = wanted.bundles[0].manifest, wanted.checkpoint.facts
    last = manifest.last_logits
    directory = naive_directory(wanted.cache, wanted.checkpoint.sha256, facts, manifest.dtype, last_logits=last)
    if not directory.is_dir():
        wanted.started("export transformers' model plainly (kept for next time)")
        request = {
            "checkpoint": str(wanted.checkpoint.path),
            "output": str(directory),
            "facts": facts.to_json(),
            "dtype": manifest.dtype,
            "num_layers": facts.num_hidden_layers,
            "last_logits": last,
        }
        wanted.make("naive", request)
    return [
        Candidate(
            name="naive",
            kind="naive",
            path=str(directory),
            dtype=manifest.dtype,
            max_length=naive_max_length(facts),
            vocab_size=facts.vocab_size,
            last_logits=last,
        )
    ]


def make(checkpoint: str, output: str, facts: dict[str, Any], **choices: Any) -> None:
    """`export_naive` of plain values."""
    export_naive(Path(checkpoint), Path(output), facts=DogeFacts.from_json(facts), **choices)


def naive_directory(cache: Path, checkpoint_sha256: str, facts: DogeFacts, dtype: str, *, last_logits: bool) -> Path:
    """Where the export of a checkpoint belongs: a folder named by all that it depends on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxscript")}
    key = {"version": _VERSION, "checkpoint": checkpoint_sha256, "facts": facts.to_json(), "libraries": versions}
    digest = hashlib.sha256(json.dumps({**key, "dtype": dtype, "last": last_logits}, sort_keys=True).encode())
    return cache / f"naive-{digest.hexdigest()[:24]}"


def export_naive(
    checkpoint: Path, output: Path, *, facts: DogeFacts, dtype: str, num_layers: int | None, last_logits: bool
) -> None:
    """Write the export to `output`, aside first.

    Raises:
        UnsupportedModelError: transformers cannot load the checkpoint, or torch cannot export it.
    """
    import torch

    from doge_deploy.bench.baselines.eager import load_model
    from doge_deploy.graph.trace import quiet_exporter

    if dtype == "bfloat16":
        raise UnsupportedModelError("naive: ONNX Runtime's CPU provider has no bfloat16 arithmetic")
    config: dict[str, Any] = {}
    if facts.rope_type == "dynamic":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": facts.rope["rope_theta"]}
    model = load_model(checkpoint, dtype=dtype, num_layers=num_layers, config=config)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        with quiet_exporter(), torch.no_grad():
            _export(_with_flat_cache(model, last_logits).eval(), aside / MODEL_FILE, facts, getattr(torch, dtype))
        with contextlib.suppress(OSError):  # another run was faster
            os.rename(aside, output)
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"naive: torch.onnx.export cannot export {checkpoint}: {reason}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _with_flat_cache(model: Any, last_logits: bool) -> Any:
    import torch
    from transformers import DynamicCache

    class FlatCache(torch.nn.Module):
        """`DogeForCausalLM` with keys and values as tensors in a row."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
                use_cache=True,
                logits_to_keep=1 if last_logits else 0,
            )
            present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
            return (output.logits, *present)

    return FlatCache()


def _export(module: Any, path: Path, facts: DogeFacts, dtype: Any) -> None:
    import torch

    batch, new, past = _EXAMPLE["batch"], _EXAMPLE["new"], _EXAMPLE["past"]
    caches = [f"{layer}.{kind}" for layer in range(facts.num_hidden_layers) for kind in ("key", "value")]
    shape = (batch, facts.num_key_value_heads, past, facts.head_dim)
    ids = (
        torch.ones(batch, new, dtype=torch.long),
        torch.ones(batch, past + new, dtype=torch.long),
        torch.arange(past, past + new).repeat(batch, 1),
    )
    free = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        module,
        (*ids, *(torch.zeros(shape, dtype=dtype) for _ in caches)),
        path,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past.{name}" for name in caches)],
        output_names=["logits", *(f"present.{name}" for name in caches)],
        dynamic_shapes=(*({0: free, 1: free} for _ in ids), tuple({0: free, 2: free} for _ in caches)),
        dynamo=True,
        external_data=True,
        verbose=False,
    )


def open_runner(candidate: Candidate, threads: int) -> NaiveRunner:
    """What `export_naive` wrote, with denormal numbers flushed as in sessions of bundles."""
    directory = Path(candidate.path)
    session = open_session(directory / MODEL_FILE, directory, threads=threads, flush_denormals=True)
    return NaiveRunner(session, max_length=candidate.max_length, last_logits=candidate.last_logits)


class NaiveRunner(Runner):
    """The plainest loop with I/O binding: presents of one call are bound as pasts of the next."""

    def __init__(self, session: Any, *, max_length: int, last_logits: bool) -> None:
        super().__init__(max_length=max_length, last_logits=last_logits)
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        self._past = [value for value in session.get_inputs() if value.name.startswith("past.")]

    def _reset(self, batch_size: int) -> None:
        import onnxruntime

        self._values: dict[str, Any] = {}
        for value in self._past:
            _, heads, _, size = value.shape
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            empty = np.zeros((batch_size, heads, 0, size), dtype)
            self._values[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        batch, new = input_ids.shape
        held = int(self.row_lengths[0])
        feeds: Mapping[str, IntArray] = {
            "input_ids": np.ascontiguousarray(input_ids),
            "attention_mask": np.ones((batch, held + new), np.int64),
            "position_ids": np.tile(np.arange(held, held + new), (batch, 1)),
        }
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        outputs = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._values = {name: outputs[name.replace("past.", "present.", 1)] for name in self._values}
        logits: FloatArray = outputs["logits"].numpy()
        return logits

    def cache(self) -> dict[str, list[FloatArray]]:
        return {name.replace("past.", "present.", 1): list(value.numpy()) for name, value in self._values.items()}

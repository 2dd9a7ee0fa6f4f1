"""transformers with a `StaticCache`, its decode step compiled by `torch.compile`: transformers' own advice for speed.

A prompt runs as it is, as in `generate`: another length of it would be compiled anew. The cache is as long as the
longest workload, since every slot of it is computed in every step. RoPE of type "dynamic" branches on the largest
position, which cannot be compiled whole; it is loaded as "default", which has the same angles up to the original
length, and longer rows are refused.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from doge_deploy.bench.baselines.catalog import LeftOut, Wanted
from doge_deploy.bench.baselines.eager import load_model, logits_of, set_threads
from doge_deploy.bench.candidates import Candidate
from doge_deploy.runtime.base import FloatArray, IntArray, Runner

LIBRARIES = ("torch", "torch._dynamo", "torch._inductor", "transformers.models.doge.modeling_doge")

_COMPILERS = ("g++", "clang++")


def candidates(wanted: Wanted) -> list[Candidate]:
    """The checkpoint, with a cache for the longest workload.

    Raises:
        LeftOut: there is no C++ compiler, which PyTorch needs on a CPU.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS)):
        raise LeftOut(f"bench --against compile needs a C++ compiler, one of {', '.join(_COMPILERS)}")
    manifest, facts = wanted.bundles[0].manifest, wanted.checkpoint.facts
    longest = max(workload.total_length for workload in wanted.workloads)
    return [
        Candidate(
            name="compile",
            kind="compile",
            path=str(wanted.checkpoint.path),
            dtype=manifest.dtype,
            max_length=min(longest, facts.stateless_length or longest),
            vocab_size=facts.vocab_size,
            last_logits=manifest.last_logits,
            num_layers=facts.num_hidden_layers,
        )
    ]


def open_runner(candidate: Candidate, threads: int) -> CompiledRunner:
    """The checkpoint in transformers; nothing is compiled before the first decode step."""
    from transformers import DogeConfig

    set_threads(threads)
    rope: Any = DogeConfig.from_pretrained(candidate.path).rope_parameters
    changes = {}
    if rope["rope_type"] == "dynamic":
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    layers, path = candidate.num_layers, Path(candidate.path)
    model = load_model(path, dtype=candidate.dtype, num_layers=layers, config=changes)
    return CompiledRunner(model, max_length=candidate.max_length, last_logits=candidate.last_logits)


class CompiledRunner(Runner):
    """`DogeForCausalLM` with a cache of `max_length` slots."""

    def __init__(self, model: Any, *, max_length: int, last_logits: bool) -> None:
        import torch

        super().__init__(max_length=max_length, last_logits=last_logits)
        self._model = model
        self._step = torch.compile(model, dynamic=False)
        self._batch = 0

    def _reset(self, batch_size: int) -> None:
        import torch
        from transformers import StaticCache

        if self._batch != batch_size:
            self._batch = batch_size
            self._cache = StaticCache(config=self._model.config, max_cache_len=self.max_length)
        else:
            with torch.inference_mode():
                self._cache.reset()  # type: ignore[no-untyped-call]

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        import torch

        width, held = input_ids.shape[1], int(self.row_lengths[0])
        call = self._step if width == 1 and held else self._model
        with torch.inference_mode():
            output = call(
                input_ids=torch.from_numpy(input_ids),
                position_ids=torch.arange(held, held + width)[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if self.last_logits else 0,
            )
            return logits_of(output)

    def cache(self) -> dict[str, list[FloatArray]]:
        kept: dict[str, list[FloatArray]] = {}
        layers: Any = self._cache.layers
        held = int(self.row_lengths.max())
        for index, layer in enumerate(layers):
            kept[f"present.{index}.key"] = [row[:, :held].float().numpy() for row in layer.keys]
            kept[f"present.{index}.value"] = [row[:, :held].float().numpy() for row in layer.values]
        return kept

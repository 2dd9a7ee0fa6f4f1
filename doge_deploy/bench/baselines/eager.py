"""transformers in eager mode, by the plainest loop: `DynamicCache`, `torch.inference_mode`, no mask beyond its own.

Rows of a benchmark are of equal length, so no padding has to be hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.bench.baselines.catalog import Wanted
from doge_deploy.bench.candidates import Candidate
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.runtime.base import FloatArray, IntArray, Runner

LIBRARIES = ("torch", "transformers.models.doge.modeling_doge")


def load_model(path: Path, *, dtype: str, num_layers: int | None, config: dict[str, Any] | None = None) -> Any:
    """transformers' `DogeForCausalLM` in eager mode.

    Args:
        path: the checkpoint's directory.
        dtype: NumPy's name of it.
        num_layers: only the first so many; all where None.
        config: keys of config.json to replace.

    Raises:
        UnsupportedModelError: transformers cannot load it.
    """
    import torch
    from transformers import DogeConfig, DogeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    changes = dict(config or {}) | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    try:
        loaded = DogeForCausalLM.from_pretrained(
            path,
            config=DogeConfig.from_pretrained(path, **changes),
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"transformers cannot load {path}: {reason}") from error
    return loaded.eval()  # type: ignore[no-untyped-call]


def candidates(wanted: Wanted) -> list[Candidate]:
    """The checkpoint itself."""
    manifest, facts = wanted.bundles[0].manifest, wanted.checkpoint.facts
    return [
        Candidate(
            name="transformers",
            kind="transformers",
            path=str(wanted.checkpoint.path),
            dtype=manifest.dtype,
            max_length=max(facts.max_position_embeddings, manifest.max_length),
            vocab_size=facts.vocab_size,
            last_logits=manifest.last_logits,
            num_layers=facts.num_hidden_layers,
        )
    ]


def open_runner(candidate: Candidate, threads: int) -> EagerRunner:
    """The checkpoint in transformers."""
    set_threads(threads)
    model = load_model(Path(candidate.path), dtype=candidate.dtype, num_layers=candidate.num_layers)
    return EagerRunner(model, max_length=candidate.max_length, last_logits=candidate.last_logits)


def set_threads(threads: int) -> None:
    """Of PyTorch; and denormal numbers are taken for zero, as in sessions of bundles."""
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.set_flush_denormal(True)


def logits_of(output: Any) -> FloatArray:
    """The logits that a model of transformers gave, float32 where they are bfloat16, which NumPy does not have."""
    import torch

    logits = output.logits
    values: FloatArray = (logits.float() if logits.dtype == torch.bfloat16 else logits).numpy()
    return values


class EagerRunner(Runner):
    """`DogeForCausalLM` with its own growing cache."""

    def __init__(self, model: Any, *, max_length: int, last_logits: bool) -> None:
        super().__init__(max_length=max_length, last_logits=last_logits)
        self._model = model

    def _reset(self, batch_size: int) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        import torch

        with torch.inference_mode():
            # Only the last token's logits where the bundle gives only those: nobody works for the bin.
            output = self._model(
                input_ids=torch.from_numpy(input_ids),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if self.last_logits else 0,
            )
            return logits_of(output)

    def cache(self) -> dict[str, list[FloatArray]]:
        kept: dict[str, list[FloatArray]] = {}
        layers: Any = self._cache.layers
        for index, layer in enumerate(layers):
            kept[f"present.{index}.key"] = [np.asarray(row.float()) for row in layer.keys]
            kept[f"present.{index}.value"] = [np.asarray(row.float()) for row in layer.values]
        return kept

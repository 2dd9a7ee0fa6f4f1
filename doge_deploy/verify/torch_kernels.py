"""A bundle's static layout in PyTorch, its `doge` operators run as kernels: `verify --backend torch-kernels`.

The weights are the checkpoint's, the graph is the model that was traced. So a difference lies in the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.graph.trace import reachable_windows
from doge_deploy.graph.weight_formats import format_of
from doge_deploy.kernels.launch import require_launcher
from doge_deploy.kernels.torch_ops import kernels_in_torch
from doge_deploy.model.decoder import StaticCausalLM
from doge_deploy.model.rope import rope_tensors
from doge_deploy.options.backends import TORCH_KERNELS
from doge_deploy.runtime.base import BundleRunner, FloatArray, IntArray
from doge_deploy.targets.backend import Backend, SessionOptions


class TorchKernels(Backend["TorchKernelsRunner"]):
    """Only `verify` has it, and it is not registered: it needs the checkpoint beside the bundle."""

    name = TORCH_KERNELS
    title = "PyTorch with the kernels of plugins"
    layouts = ("static",)
    shows_selections = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def open(
        self, bundle: Bundle, layout: Layout, options: SessionOptions, *, graph: bytes | None = None
    ) -> TorchKernelsRunner:
        return TorchKernelsRunner(bundle, self._checkpoint)

    def runs(self, layout: Layout, options: SessionOptions) -> str:
        return f"kernels on {_device().type}"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TorchKernelsRunner(BundleRunner):
    """The model on one device; caches stay there.

    Args:
        bundle: with a static layout.
        checkpoint: the one that it was exported from.

    Raises:
        UsageError: the bundle has no static layout.
        UnsupportedModelError: it has quantized weights, a sliding window or a RoPE with a memory.
        MissingDependencyError: there is no CUDA device, and Triton does not interpret.
    """

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint) -> None:
        manifest = bundle.manifest
        if "static" not in manifest.layouts:
            raise UsageError(f"{bundle.path} has no static layout, which kernels are verified in")
        if manifest.facts.rope_remembers(manifest.max_length) or manifest.facts.sliding_window:
            raise UnsupportedModelError(
                f"{bundle.path}: kernels are verified without a sliding window and without a RoPE that remembers"
            )
        weight_format = format_of(manifest.options)
        if weight_format and (reason := weight_format.target_refusal(TORCH_KERNELS)):
            raise UnsupportedModelError(f"{bundle.path} {reason}")
        super().__init__(max_length=manifest.max_length, last_logits=manifest.last_logits)
        self.device = _device()
        require_launcher(self.device.type)
        layout = bundle.layout("static")
        facts = manifest.facts
        self.signature = layout.signature
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        with torch.device(self.device):
            self.model = StaticCausalLM(
                facts,
                max_length=manifest.max_length,
                windows=reachable_windows(facts, "static", manifest.max_length),
                routing=manifest.options.routing,
                last_logits=self.last_logits,
                dtype=self.dtype,
            ).eval()
        self._load(checkpoint)
        self.extra: dict[str, np.ndarray[Any, Any]] = {}
        """Selections of the last call: `kept.<layer>`, `experts.<layer>`."""

    def _load(self, checkpoint: Checkpoint) -> None:
        """Copy the weights, each into the dtype that the model holds it in."""
        tables = rope_tensors(checkpoint.config, checkpoint.facts, self.max_length)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            tensor.data.copy_(tables[name] if name in tables else checkpoint.read(name))

    def _reset(self, batch_size: int) -> None:
        specs = {spec.name: spec for spec in self.signature.inputs}
        self._past = {}
        for past, present in self.signature.past():
            shape = [batch_size if isinstance(axis, str) else axis for axis in specs[past.name].shape]
            dtype = getattr(torch, specs[past.name].dtype)
            self._past[present.name] = torch.zeros(shape, dtype=dtype, device=self.device)

    @torch.no_grad()
    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        selected: dict[str, list[torch.Tensor]] = {"kept": [], "experts": []}
        names = list(self._past)
        caches = list(self._past.values())
        count = len(caches) // len(self.model.layers())
        past = [tuple(caches[start : start + count]) for start in range(0, len(caches), count)]
        with kernels_in_torch(self.device.type, lambda kind, value: selected[kind].append(value)):
            logits, present = self.model(
                self._tensor(input_ids),
                self._tensor(self.row_lengths),
                past,
                self._tensor(lengths) if self.last_logits else None,
            )
        self._past = dict(zip(names, (tensor for layer in present for tensor in layer), strict=True))
        self.extra = {
            f"{kind}.{layer}": value.cpu().numpy()
            for kind, values in selected.items()
            for layer, value in enumerate(values)
        }
        return _array(logits)

    def _tensor(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def cache(self) -> dict[str, list[FloatArray]]:
        return {
            name: [_array(rows[b, :, :n]) for b, n in enumerate(self.row_lengths)] for name, rows in self._past.items()
        }


def _array(tensor: torch.Tensor) -> FloatArray:
    """NumPy has no bfloat16: that is widened, exactly."""
    array: FloatArray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array

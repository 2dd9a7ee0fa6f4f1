"""A whole Doge with every plugin node run by Triton's interpreter, all other nodes by ONNX's reference evaluator.

Nothing here is shared with ONNX Runtime: the evaluator is onnx's own, in NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from doge_deploy.bundle.opening import Bundle
from doge_deploy.graph.passes.plugin_chains import PluginChainPass
from doge_deploy.kernels.launch import run_kernel
from doge_deploy.kernels.registry import installed
from doge_deploy.kernels.spec import PluginSpec
from doge_deploy.runtime.base import BundleRunner, FloatArray, IntArray


def plugin_operator(spec: PluginSpec) -> type[OpRun]:
    """The plugin as an operator of the reference evaluator; fresh memory is filled with NaN first."""

    def run(self: OpRun, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        types = {"int": int, "float": float, "str": str}
        attributes = {
            attribute.name: types[attribute.type](attributes[attribute.name]) for attribute in spec.attributes
        }
        tensors = [torch.from_numpy(np.array(array)) for array in inputs]
        return tuple(tensor.numpy() for tensor in run_kernel(spec, tensors, attributes, poison=True))

    return type(spec.name, (OpRun,), {"op_domain": spec.namespace, "_run": run})


class InterpreterRunner(BundleRunner):
    """The static graph of a bundle in its plugin lowering.

    `extra` holds what the plugins selected in the last call: `kept.<layer>` `[B, Hkv, Q, K]` bool, from threshold and
    slot of the row's last key, and `experts.<layer>` `[N, k]`.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(max_length=bundle.manifest.max_length, last_logits=bundle.manifest.last_logits)
        layout = bundle.layout("static")
        self.signature = layout.signature
        self.facts = bundle.manifest.facts
        registry = installed()
        model = PluginChainPass(registry)(ir.load(bundle.path / layout.file)).model
        self.plugins = [node.op_type for node in model.graph if node.domain == "doge"]
        proto = ir.to_proto(ir.external_data.load_to_model(model))
        self.evaluator = ReferenceEvaluator(proto, new_ops=[plugin_operator(spec) for spec in registry.specs()])
        self.extra: dict[str, np.ndarray[Any, Any]] = {}

    def _reset(self, batch_size: int) -> None:
        self.buffers = {
            past.name: np.zeros([batch_size if axis == "batch_size" else axis for axis in past.shape], past.dtype)
            for past, _ in self.signature.past()
        }

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        feeds: dict[str, Any] = {"input_ids": input_ids, "write_indices": self.row_lengths, **self.buffers}
        if any(spec.name == "sequence_lengths" for spec in self.signature.inputs):
            feeds["sequence_lengths"] = lengths
        values = self.evaluator.run(None, feeds, intermediate=True)
        self.buffers = {past.name: values[present.name] for past, present in self.signature.past()}
        self.extra = self._selected(values, input_ids.shape[1])
        logits: FloatArray = values["logits"]
        return logits

    def _selected(self, values: Mapping[str, Any], width: int) -> dict[str, np.ndarray[Any, Any]]:
        selected = {}
        for layer in range(self.facts.num_hidden_layers):
            attention, mixture = f"layers.{layer}.DynamicMaskAttention/", f"layers.{layer}.CDMoE/"
            if attention + "threshold" in values:
                score = values[f"present.{layer}.score"].swapaxes(2, 3)
                slots = np.arange(score.shape[3])
                rows = self.row_lengths[:, None] + np.arange(width)
                threshold = values[attention + "threshold"][..., None]
                better = (score > threshold) | (
                    (score == threshold) & (slots <= values[attention + "last_kept"][..., None])
                )
                selected[f"kept.{layer}"] = better & (slots <= rows[:, None, :, None])
            if mixture + "expert_ids" in values:
                ids = values[mixture + "expert_ids"].astype(np.int64)
                selected[f"experts.{layer}"] = ids.reshape(-1, ids.shape[-1])
        return selected

    def cache(self) -> dict[str, list[FloatArray]]:
        return {
            present.name: [self.buffers[past.name][b, :, :n].copy() for b, n in enumerate(self.row_lengths)]
            for past, present in self.signature.past()
        }

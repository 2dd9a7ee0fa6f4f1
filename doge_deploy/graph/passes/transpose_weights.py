"""Store linear weights the way MatMul reads them."""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.graph.passes.pending import pending
from doge_deploy.graph.weight_file import TRANSPOSED_SUFFIX


class TransposeWeightsPass(ir.passes.InPlacePass):
    """Transpose(initializer) -> an initializer `<name>.T`.

    Needs: initializers named as in the checkpoint, data not yet attached.
    Promises: no node transposes an initializer unless that initializer has another use.

    1. Fires where a 2-D initializer's only use is one `Transpose(perm=[1, 0])`, as torch.export writes for linear
       layers.
    2. Must not fire where the initializer is used elsewhere too: a tied embedding stays one tensor, and the runtime
       transposes it (or not) by itself.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for weight in list(model.graph.initializers.values()):
            uses = weight.uses()
            if len(uses) != 1:
                continue
            (use,) = uses
            node = use.node
            if node.op_type != "Transpose" or node.attributes["perm"].as_ints() != (1, 0):
                continue
            assert weight.shape is not None and weight.name is not None
            name = weight.name + TRANSPOSED_SUFFIX
            stored = ir.Value(name=name, shape=ir.Shape(weight.shape[::-1]), type=weight.type)
            node.outputs[0].replace_all_uses_with(stored)
            model.graph.remove(node, safe=True)
            del model.graph.initializers[weight.name]
            stored.const_value = pending(_dtype(weight), ir.Shape(weight.shape[::-1]), name)
            model.graph.register_initializer(stored)
            modified = True
        return ir.passes.PassResult(model, modified)


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype

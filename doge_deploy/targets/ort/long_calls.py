"""Quantized weights for calls of many tokens, on processors where whole numbers are slow to multiply."""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.targets.ort.matching import CONTRIB, Emitter, attribute, take_place

FLOAT_ACCURACY_LEVEL = 1
"""MatMulNBits unpacks weights of 4 bits tile by tile and multiplies in float32."""


class UnpackInCallPass(ir.passes.InPlacePass):
    """MatMulNBits -> for 8 bits, operators that unpack the weight, and FusedMatMul; for 4 bits MatMulNBits in float32.

    ONNX Runtime multiplies weights of 8 bits in whole numbers only, which takes longer than float32 where a processor
    has no instruction for sums of products of bytes. Over many tokens it pays to unpack a weight in each call.
    (`DequantizeLinear` in blocks goes number by number; with one scale for the whole tensor it does not.)

    Needs: constants must not be folded when the graph is loaded, or all weights would be unpacked for good.
    Promises: the standard graph's numbers up to the order of sums, the state is not rounded; but see 1 and 2.

    1. The product that gives the logits of one token a row stays.
    2. So does a weight with zero points.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        logits = model.graph.outputs[0]
        one_token = logits.shape is not None and logits.shape[1] == 1
        products = [node for node in model.graph if node.op_type == "MatMulNBits" and node.domain == CONTRIB]
        found = [node for node in products if not (one_token and node.outputs[0] is logits)]
        for product in found:
            if attribute(product, "bits") == 4:
                product.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FLOAT_ACCURACY_LEVEL)
            elif len(product.inputs) == 3:
                _unpack(product)
        return ir.passes.PassResult(model, bool(found))


def _unpack(product: ir.Node) -> None:
    emit = Emitter(product, product.outputs[0].name or "product")
    x, blocks, scale = product.inputs
    one = emit("Constant", name="one", value_float=1.0).outputs[0]
    middle = emit("Constant", name="middle", value=ir.tensor(128, ir.DataType.UINT8)).outputs[0]
    whole = emit("DequantizeLinear", blocks, one, middle, name="whole").outputs[0]
    scales = emit("Unsqueeze", scale, emit.ints(2, name="scale_axis"), name="scales").outputs[0]
    scaled = emit("Mul", whole, scales, name="scaled").outputs[0]
    shape = emit.ints(attribute(product, "N"), attribute(product, "K"), name="shape")
    rows = emit("Reshape", scaled, shape, name="rows").outputs[0]
    fused = emit("FusedMatMul", x, rows, domain=CONTRIB, transB=1)
    take_place(product.outputs[0], fused.outputs[0])

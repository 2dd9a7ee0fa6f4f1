"""The table of the CUDA provider's kernels, asked of the provider itself: doge_deploy/targets/cuda/kernels.json.

    python tests/cuda_standin.py /tmp/standin
    LD_LIBRARY_PATH=/tmp/standin python tests/cuda_kernels.py --write      # or without --write: does the table hold?

For every operator that a lowered graph may have, and every element type that its schema allows for each of its type
parameters, a graph of that one node is opened, and ONNX Runtime says which provider got it. It needs onnxruntime-gpu.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

OPSET = 24
TABLE = Path(__file__).parent.parent / "doge_deploy" / "targets" / "cuda" / "kernels.json"
CONTRIB = "com.microsoft"

OPERATORS = """
    Add And Attention BitwiseXor Cast CastLike Clip Concat ConstantOfShape Cos CumSum DequantizeLinear Div
    Equal Erf Exp Expand Gather GatherElements GatherND Gelu Greater GreaterOrEqual HardSwish Identity IsNaN
    LeakyRelu Less LessOrEqual MatMul Max Min Mish Mod Mul Neg Not Or PRelu Pow RMSNormalization Range
    Reciprocal ReduceMax ReduceSum Relu Reshape RotaryEmbedding ScatterElements ScatterND Shape Sigmoid Sin
    Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh TensorScatter TopK Transpose Unsqueeze Where
""".split()

DTYPES = {
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
}
"""Those that a bundle can have."""

_INPUTS = {"Attention": (0, 1, 2, 3, 6), "Clip": (0, 1, 2), "Slice": (0, 1, 2, 3), "ReduceSum": (0, 1)}
"""Which inputs the node has, where not those that it must have."""

_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "DequantizeLinear": {"axis": 1, "block_size": 32},
    "TensorScatter": {"axis": 2},
    "Split": {"num_outputs": 2},
    "ReduceMax": {"keepdims": 1},
    "Concat": {"axis": 0},
}

# ONNX knows no schema of these; as in ONNX Runtime's docs/ContribOperators.md.
_CONTRIB = {
    "MatMulNBits": (["T1", "T2", "T1"], {"T1": ["float16", "bfloat16", "float32"], "T2": ["uint8"]}, "T1"),
    "GatherBlockQuantized": (
        ["T1", "Tind", "T2"],
        {"T1": ["int4", "uint4", "uint8"], "Tind": ["int32", "int64"], "T2": ["float16", "bfloat16", "float32"]},
        "T2",
    ),
}
_CONTRIB_ATTRIBUTES = {
    "MatMulNBits": {"K": 64, "N": 32, "bits": 4, "block_size": 32},
    "GatherBlockQuantized": {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1},
}


def graph(op: str, inputs: list[str], output: int, attributes: dict[str, Any], domain: str = "") -> bytes:
    """A model of one node whose inputs have these types, "" for none."""
    names = [f"x{i}" if dtype else "" for i, dtype in enumerate(inputs)]
    outputs = ["y0", "y1"] if op in ("TopK", "Split") else ["y0"]
    node = helper.make_node(op, names, outputs, domain=domain, **attributes)
    values = [
        onnx.ValueInfoProto(name=name, type=helper.make_tensor_type_proto(DTYPES[dtype], None))
        for name, dtype in zip(names, inputs, strict=True)
        if dtype
    ]
    result = onnx.ValueInfoProto(name="y0", type=helper.make_tensor_type_proto(output, None))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    one = helper.make_graph([node], "one", values, [result])
    data: bytes = helper.make_model(one, opset_imports=opsets, ir_version=11).SerializeToString()
    return data


def on_device(model: bytes, level: Any = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL) -> bool:
    """Whether the CUDA provider gets all nodes; False too where ONNX Runtime refuses the graph."""
    try:
        placed = placement(model, level)
    except Exception:
        return False
    return set(placed) == {"CUDAExecutionProvider"}


def placement(model: bytes, level: Any = None, folder: str = ".") -> dict[str, list[tuple[str, str]]]:
    """Operator and name of the nodes of each provider."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    if level is not None:
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        model, options, providers=[("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    )
    if "CUDAExecutionProvider" not in session.get_providers():
        sys.exit("the CUDA provider did not start: is LD_LIBRARY_PATH the folder of tests/cuda_standin.py?")
    found: dict[str, list[tuple[str, str]]] = {}
    for assigned in session.get_provider_graph_assignment_info():
        nodes = [(node.op_type, node.name) for node in assigned.get_nodes()]
        found.setdefault(assigned.ep_name, []).extend(nodes)
    return found


def probe(op: str) -> dict[str, Any]:
    """What the table says of an operator of ONNX."""
    schema = onnx.defs.get_schema(op, OPSET, "")
    required = [
        i for i, spec in enumerate(schema.inputs) if spec.option != onnx.defs.OpSchema.FormalParameterOption.Optional
    ]
    wanted = _INPUTS.get(op, tuple(required))
    parameters = {
        one.type_param_str: [name for name in DTYPES if f"tensor({_onnx_name(name)})" in one.allowed_type_strs]
        for one in schema.type_constraints
    }
    count = max(wanted, default=-1) + 1
    strings = [schema.inputs[i].type_str if i in wanted else "" for i in range(count)]
    return {"since": schema.since_version, "types": _types(op, strings, parameters, schema.outputs[0].type_str)}


def _types(
    op: str, strings: list[str], parameters: dict[str, list[str]], out: str, domain: str = ""
) -> dict[str, list[str]]:
    used = [name for name in parameters if name in strings or name == out]
    found: dict[str, list[str]] = {}
    for parameter in used:
        found[parameter] = [
            dtype
            for dtype in parameters[parameter]
            if any(
                on_device(graph(op, [_of(text, choice) for text in strings], DTYPES[_of(out, choice)], extra, domain))
                for choice, extra in _choices(op, used, parameters, parameter, dtype, out, domain)
            )
        ]
    return found


def _choices(
    op: str, used: list[str], parameters: dict[str, list[str]], fixed: str, dtype: str, out: str, domain: str
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Types of all parameters with one of them given: the others the same where they may, or each its plainest."""
    for wish in (dtype, "float32", "float16", "int64", "int4"):
        choice = {}
        for name in used:
            legal = parameters[name]
            plain = next((one for one in (wish, "float32", "int64", "bool", "uint8", "int4") if one in legal), legal[0])
            choice[name] = dtype if name == fixed else plain
        extra = dict(_CONTRIB_ATTRIBUTES[op] if domain else _ATTRIBUTES.get(op, {}))
        result = _of(out, choice)
        if op == "Cast":
            extra["to"] = DTYPES[result]
        if op == "ConstantOfShape":
            extra["value"] = onnx.TensorProto(data_type=DTYPES[result], dims=[1], raw_data=bytes(_bytes(result)))
        yield choice, extra


def _bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 1 if dtype.endswith("int4") else np.dtype(dtype).itemsize


def _of(text: str, choice: dict[str, str]) -> str:
    """A parameter's type, or the one that the text names."""
    if not text or text in choice:
        return choice.get(text, "")
    name = text.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32"}.get(name, name)


def _onnx_name(name: str) -> str:
    return {"float32": "float"}.get(name, name)


def ask() -> dict[str, Any]:
    """The whole table."""
    operators: dict[str, Any] = {op: probe(op) for op in OPERATORS}
    for op, (strings, parameters, out) in _CONTRIB.items():
        operators[f"{CONTRIB}::{op}"] = {"since": 1, "types": _types(op, strings, parameters, out, CONTRIB)}
    return {
        "source": f"the CUDA provider of onnxruntime-gpu {onnxruntime.__version__}, asked by tests/cuda_kernels.py",
        "onnxruntime": onnxruntime.__version__,
        "opset": OPSET,
        "operators": operators,
    }


def main() -> None:
    asked = ask()
    if "--write" in sys.argv[1:]:
        lines = [f'    "{name}": {json.dumps(entry)}' for name, entry in sorted(asked.pop("operators").items())]
        head = json.dumps(asked, indent=2).removesuffix("\n}")
        TABLE.write_text(head + ',\n  "operators": {\n' + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")
        return
    written = json.loads(TABLE.read_text(encoding="utf-8"))
    if written != asked:
        different = [op for op in asked["operators"] if written["operators"].get(op) != asked["operators"][op]]
        sys.exit(f"{TABLE} says otherwise than onnxruntime-gpu {onnxruntime.__version__}: {different}")
    print(f"{len(asked['operators'])} operators: the table holds for onnxruntime-gpu {onnxruntime.__version__}")


if __name__ == "__main__":
    main()

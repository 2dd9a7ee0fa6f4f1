"""The products of a call alone, by ONNX Runtime and by ggml, which llama.cpp computes with: ggml_products.py BUNDLE...

For a decode step of one row and of eight, and for a prompt of 512 (the head for the last token of each row), all
products with weights of the bundle's graph, one after the other and nothing between them, random numbers for weights,
in turns. ggml comes with llama-cpp-python; its weights are F32, Q8_0 and Q4_0, laid out as llama.cpp lays them out. So
the table says how much of the difference to llama.cpp is the products', and how fast they are in another library.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from doge_deploy.bundle.opening import open_bundle

CALLS = {"decode, 1 row": (1, 1), "decode, 8 rows": (8, 8), "a prompt of 512": (512, 1)}
"""Name: rows of the products of layers, and of the head."""

F32, Q4_0, Q8_0 = 0, 2, 8
"""ggml's numbers of these types."""


def products(graph: Path) -> list[onnx.NodeProto]:
    """Products with weights, each with attributes K and N, of the graph as ONNX Runtime optimises it."""
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder, "model.onnx"))
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        model = onnx.load(Path(folder, "model.onnx"), load_external_data=False)
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            found.append(node)
        elif node.op_type in ("MatMul", "FusedMatMul") and len(shape := dims.get(node.input[1], [])) == 2:
            transposed = any(one.name == "transB" and one.i for one in node.attribute)
            inner, outer = shape[::-1] if transposed else shape
            if outer > 2:  # else it is that of the scores of the dynamic mask
                node.attribute.extend([helper.make_attribute("K", inner), helper.make_attribute("N", outer)])
                found.append(node)
    return found


def sizes(node: onnx.NodeProto) -> dict[str, int]:
    """Its attributes that are whole numbers."""
    return {one.name: one.i for one in node.attribute if one.type == onnx.AttributeProto.INT}


def ours(nodes: list[onnx.NodeProto], rows: int, head_rows: int, threads: int) -> Callable[[], object]:
    """A session of these products, each with an input and an output of its own."""
    rng = np.random.default_rng(0)
    made, tensors, inputs, outputs, feeds = [], [], [], [], {}
    for number, node in enumerate(nodes):
        attributes = sizes(node)
        inner, outer = attributes["K"], attributes["N"]
        height = head_rows if number == len(nodes) - 1 else rows
        x, y, w = f"x{inner}_{height}", f"y{number}", f"w{number}"
        weights = []
        if node.op_type == "MatMulNBits":
            blocks = inner // attributes["block_size"]
            packed = rng.integers(0, 256, (outer, blocks, attributes["block_size"] * attributes["bits"] // 8), np.uint8)
            scales = rng.random((outer, blocks), np.float32)
            tensors += [onnx.numpy_helper.from_array(packed, w), onnx.numpy_helper.from_array(scales, w + "s")]
            weights = [w, w + "s"]
            made.append(helper.make_node("MatMulNBits", [x, *weights], [y], domain="com.microsoft", **attributes))
        else:
            shape = (outer, inner) if attributes.get("transB") else (inner, outer)
            tensors.append(onnx.numpy_helper.from_array(rng.random(shape, np.float32), w))
            kept = {name: value for name, value in attributes.items() if name not in ("K", "N")}
            made.append(helper.make_node(node.op_type, [x, w], [y], domain=node.domain, **kept))
        if x not in feeds:
            feeds[x] = rng.random((height, inner), np.float32)
            inputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, [height, inner]))
        outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, [height, outer]))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(made, "products", inputs, outputs, tensors), opset_imports=opsets)
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()  # outputs stay where they are: nothing is copied
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    for output in outputs:
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


class Ggml:
    """The parts of ggml's C interface that products need."""

    def __init__(self) -> None:
        place = importlib.util.find_spec("llama_cpp")
        if place is None or not place.submodule_search_locations:
            raise click.ClickException("llama-cpp-python is not installed: pip install llama-cpp-python")
        folder = Path(place.submodule_search_locations[0], "lib")
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._base.ggml_log_set(self._silent, None)
        self.backend = self.pointer(self._cpu.ggml_backend_cpu_init)()
        self.plain = self.pointer(self._base.ggml_backend_cpu_buffer_type)()
        register = self.pointer(self._cpu.ggml_backend_cpu_reg)()
        device = self.pointer(self._base.ggml_backend_reg_dev_get)(ctypes.c_void_p(register), ctypes.c_size_t(0))
        address = self.pointer(self._base.ggml_backend_reg_get_proc_address)
        extra = address(ctypes.c_void_p(register), b"ggml_backend_dev_get_extra_bufts")
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(extra)(device)
        self.repacked = None
        name = self._base.ggml_backend_buft_name
        name.restype = ctypes.c_char_p
        number = 0
        while kinds[number]:
            if name(ctypes.c_void_p(kinds[number])) == b"CPU_REPACK":
                self.repacked = kinds[number]
            number += 1

    @staticmethod
    def pointer(function: Any) -> Callable[..., int]:
        """A function that gives a pointer."""
        function.restype = ctypes.c_void_p
        called: Callable[..., int] = function
        return called

    def context(self) -> int:
        """Room for a graph's tensors, without their numbers."""

        class Parameters(ctypes.Structure):
            _fields_ = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

        make = self.pointer(self._base.ggml_init)
        make.argtypes = [Parameters]  # type: ignore[attr-defined]
        return make(Parameters(64 << 20, None, True))

    def tensor(self, context: int, kind: int, width: int, height: int) -> int:
        """A matrix of `height` rows."""
        make = self.pointer(self._base.ggml_new_tensor_2d)
        return make(ctypes.c_void_p(context), kind, ctypes.c_int64(width), ctypes.c_int64(height))

    def place(self, context: int, buffer_type: int) -> None:
        """Memory for all tensors of a context that have none."""
        take = self.pointer(self._base.ggml_backend_alloc_ctx_tensors_from_buft)
        if not take(ctypes.c_void_p(context), ctypes.c_void_p(buffer_type)):
            raise click.ClickException("ggml has no memory for these products")

    def fill(self, tensor: int, kind: int, width: int, height: int) -> None:
        """Random numbers, in the tensor's type."""
        numbers = np.random.default_rng(0).random((height, width), np.float32)
        data = numbers
        if kind != F32:
            data = np.zeros(numbers.nbytes, np.uint8)
            quantize = self._base.ggml_quantize_chunk
            quantize.restype = ctypes.c_size_t
            pointers = (numbers.ctypes.data_as(ctypes.c_void_p), data.ctypes.data_as(ctypes.c_void_p))
            rows = (ctypes.c_int64(0), ctypes.c_int64(height), ctypes.c_int64(width))
            data = data[: quantize(kind, *pointers, *rows, None)]
        write = self._base.ggml_backend_tensor_set
        pointer = data.ctypes.data_as(ctypes.c_void_p)
        write(ctypes.c_void_p(tensor), pointer, ctypes.c_size_t(0), ctypes.c_size_t(data.nbytes))

    def products(
        self, shapes: list[tuple[int, int]], kind: int, rows: int, head_rows: int, threads: int
    ) -> Callable[[], object]:
        """A graph of a product for each (K, N)."""
        held, computed = self.context(), self.context()
        weights = [self.tensor(held, kind, *shape) for shape in shapes]
        self.place(held, self.repacked if kind == Q4_0 and self.repacked else self.plain)
        for weight, shape in zip(weights, shapes, strict=True):
            self.fill(weight, kind, *shape)
        multiply = self.pointer(self._base.ggml_mul_mat)
        expand = self._base.ggml_build_forward_expand
        graph = self.pointer(self._base.ggml_new_graph)(ctypes.c_void_p(computed))
        inputs: dict[tuple[int, int], int] = {}
        for number, (weight, (inner, _)) in enumerate(zip(weights, shapes, strict=True)):
            height = head_rows if number == len(shapes) - 1 else rows
            if (inner, height) not in inputs:
                inputs[inner, height] = self.tensor(computed, F32, inner, height)
            x = ctypes.c_void_p(inputs[inner, height])
            expand(
                ctypes.c_void_p(graph), ctypes.c_void_p(multiply(ctypes.c_void_p(computed), ctypes.c_void_p(weight), x))
            )
        self.place(computed, self.plain)
        for (inner, height), x in inputs.items():
            self.fill(x, F32, inner, height)
        self._cpu.ggml_backend_cpu_set_n_threads(ctypes.c_void_p(self.backend), threads)
        compute, backend, made = (
            self._base.ggml_backend_graph_compute,
            ctypes.c_void_p(self.backend),
            ctypes.c_void_p(graph),
        )
        return lambda: compute(backend, made)


def seconds(call: Callable[[], object], times: int) -> float:
    """Median of some calls after one that is not counted."""
    call()
    taken = []
    for _ in range(times):
        start = perf_counter()
        call()
        taken.append(perf_counter() - start)
    return median(taken)


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def cli(bundles: tuple[Path, ...], threads: int, rounds: int) -> None:
    """Print a table."""
    ggml = Ggml()
    click.echo("| bundle | call | products, us | by ggml | ggml over ours: median, rounds |\n" + "| --- " * 5 + "|")
    for path in bundles:
        bundle = open_bundle(path)
        nodes = products(path / bundle.layout("static").lowered["ort"].file)
        shapes = [(sizes(node)["K"], sizes(node)["N"]) for node in nodes]
        kind = {0: F32, 4: Q4_0, 8: Q8_0}[sizes(nodes[-1]).get("bits", 0)]
        for name, (rows, head_rows) in CALLS.items():
            calls = (ours(nodes, rows, head_rows, threads), ggml.products(shapes, kind, rows, head_rows, threads))
            times = 5 if rows == 512 else 50
            found = [[seconds(call, times) for call in calls] for _ in range(rounds + 1)][1:]
            each = [theirs / mine for mine, theirs in found]
            mine, theirs = (1e6 * median(column) for column in zip(*found, strict=True))
            ratio = f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
            click.echo(f"| {path.parent.name} {path.name} | {name} | {mine:.0f} | {theirs:.0f} | {ratio} |")


if __name__ == "__main__":
    cli()

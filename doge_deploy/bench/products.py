"""How fast this machine multiplies matrices: the best of the libraries that are installed, in float32 and in 8 bits.

A prefill is products of matrices, so their rate bounds it as memory bandwidth bounds decoding. The size is that of a
prompt times a layer of a small model, large enough that threads and caches are used well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from time import perf_counter_ns
from typing import Any

import numpy as np

from doge_deploy.bench.measure import garbage_collection_off

SIZE = 1024
"""Rows and columns of both factors."""

OPERATIONS = 2 * SIZE**3
"""Multiplications and additions of a product."""

REPEATS = 5
"""Timed products per round; an untimed one goes before them."""

Product = Callable[[], object]


class ProductProbe:
    """Products ready to be timed. NumPy's BLAS must be given its threads by the environment."""

    def __init__(self, threads: int) -> None:
        self.products: dict[str, dict[str, Product]] = {}
        for library, make in _LIBRARIES.items():
            # one that is missing, or has no such product, is no limit of the machine
            with suppress(ImportError, RuntimeError, NotImplementedError):
                for dtype, product in make(threads):
                    product()
                    self.products.setdefault(dtype, {})[library] = product

    def time_products(self) -> dict[str, dict[str, list[int]]]:
        """By dtype and library the nanoseconds that each of `REPEATS` products took."""
        with garbage_collection_off():
            return {
                dtype: {library: _timed(product) for library, product in libraries.items()}
                for dtype, libraries in self.products.items()
            }


def _timed(product: Product) -> list[int]:
    product()
    times = []
    for _ in range(REPEATS):
        start = perf_counter_ns()
        product()
        times.append(perf_counter_ns() - start)
    return times


def _floats() -> Any:
    return np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)


def _bytes(dtype: type) -> Any:
    limits = np.iinfo(dtype)
    return np.random.default_rng(0).integers(limits.min, limits.max, (SIZE, SIZE), dtype, endpoint=True)


def _numpy(threads: int) -> Iterator[tuple[str, Product]]:
    a = _floats()
    yield "float32", lambda: a @ a


def _torch(threads: int) -> Iterator[tuple[str, Product]]:
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    a, b = torch.from_numpy(_floats()), torch.from_numpy(_bytes(np.int8))
    yield "float32", lambda: a @ a
    yield "int8", lambda: torch._int_mm(b, b)


def _onnxruntime(threads: int) -> Iterator[tuple[str, Product]]:
    onnx = importlib.import_module("onnx")
    runtime = importlib.import_module("onnxruntime")
    helper, numpy_helper = onnx.helper, importlib.import_module("onnx.numpy_helper")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    for dtype, operator, a, b in (
        ("float32", "MatMul", _floats(), _floats()),
        ("int8", "MatMulInteger", _bytes(np.uint8), _bytes(np.int8)),
    ):
        element = helper.np_dtype_to_tensor_dtype(a.dtype)
        out = onnx.TensorProto.FLOAT if dtype == "float32" else onnx.TensorProto.INT32
        graph = helper.make_graph(
            [helper.make_node(operator, ["a", "b"], ["c"])],
            "product",
            [helper.make_tensor_value_info("a", element, a.shape)],
            [helper.make_tensor_value_info("c", out, a.shape)],
            [numpy_helper.from_array(b, "b")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_ortvalue_input("a", runtime.OrtValue.ortvalue_from_numpy(a))
        binding.bind_output("c", "cpu")
        yield dtype, partial(_run_bound, session, binding, a)


def _run_bound(session: Any, binding: Any, kept: object) -> None:
    """Run; what is bound lies in the memory of `kept`."""
    session.run_with_iobinding(binding)


def _openvino(threads: int) -> Iterator[tuple[str, Product]]:
    openvino = importlib.import_module("openvino")
    opset = importlib.import_module("openvino.opset13")
    a = _floats()
    given = opset.parameter(a.shape, np.float32)
    model = openvino.Model([opset.matmul(given, opset.constant(a), False, True)], [given])
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    yield "float32", lambda: request.infer([a], share_inputs=True, share_outputs=True)


_LIBRARIES = {"numpy": _numpy, "torch": _torch, "onnxruntime": _onnxruntime, "openvino": _openvino}

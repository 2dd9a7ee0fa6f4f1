"""What our plugins say to NVIDIA's own `tensorrt.plugin`: run by `nox -s tensorrt-contract`.

Shapes and launches are asked for with open batch, new tokens and cached keys, as for an engine, and evaluated at
several sizes afterwards. See `tests/tensorrt_double.py` for what is real here and what is not.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tensorrt_double
import torch
from plugin_graphs import attention_graph, moe_graph

from doge_deploy.graph.passes.plugin_chains import PluginChainPass
from doge_deploy.kernels.compile import compile_one
from doge_deploy.kernels.registry import installed
from doge_deploy.kernels.spec import OperatorPlugin, PluginSpec
from doge_deploy.model.attention import dynamic_mask_attention
from doge_deploy.model.moe import cdmoe

pytestmark = pytest.mark.skipif(bool(tensorrt_double.missing()), reason=tensorrt_double.missing())

ARCH = 87
SPECS = {spec.name: spec for spec in installed().specs()}
ATTENTION = installed().operator("doge", "DynamicMaskAttention")
MOE = installed().operator("doge", "CDMoE")

OPEN = {"B", "Q", "K"}
"""Sizes that an engine leaves open."""

FIXED = {"H": 4, "Hkv": 2, "S": 2, "D": 32, "W": 79, "P": 3, "C": 48, "E": 64, "router_width": 16, "k": 4}

ATTRIBUTES = {
    "keep_window_size": 16,
    "rows": 64,
    "split_keys": 128,
    "scale": 0.25,
    "sliding_window": 0,
    "num_experts_per_tok": 4,
    "norm_topk_prob": 0,
    "routing": "reference",
    "activation": "silu",
}

SIZES = ({"B": 1, "Q": 1, "K": 1}, {"B": 2, "Q": 65, "K": 257}, {"B": 3, "Q": 1, "K": 2049})


@pytest.fixture(scope="module")
def trt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """NVIDIA's module with every installed plugin registered."""
    module = tensorrt_double.load(tmp_path_factory.mktemp("tensorrt"))
    from doge_deploy.kernels.tensorrt import register

    added = register(SPECS.values(), ARCH)
    assert added == [spec.id for spec in SPECS.values()]
    assert register(SPECS.values(), ARCH) == [], "registering again must change nothing"
    return module


def example(spec: PluginSpec) -> tuple[dict[str, Any], list[list[int | str]]]:
    """Attributes of a node, and the shapes of its inputs with names where sizes are open."""
    attributes = {attribute.name: ATTRIBUTES[attribute.name] for attribute in spec.attributes}
    known = {**FIXED, **attributes}
    shapes: list[list[int | str]] = []
    for tensor in spec.inputs:
        shape: list[int | str] = []
        for size in tensor.shape:
            name = str(size)
            open_size = isinstance(size, int) or (name not in known and bool(set(re.findall(r"\w+", name)) & OPEN))
            shape.append((size if isinstance(size, int) else name) if open_size else known.get(name, 1))
        shapes.append(shape)
    return attributes, shapes


def sizes_of(shapes: list[list[int | str]], spec: PluginSpec, base: Mapping[str, int]) -> dict[str, int]:
    """A number for every open size, also for those that are expressions of others."""
    known = {**FIXED, **ATTRIBUTES, **base}
    return {
        name: int(size.evaluate(known)) if hasattr(size, "evaluate") else int(size)
        for tensor, shape in zip(spec.inputs, shapes, strict=True)
        for size, name in zip(tensor.shape, shape, strict=True)
        if isinstance(name, str)
    }


def numbers(shapes: list[list[int | str]], sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    return [tuple(sizes[size] if isinstance(size, str) else size for size in shape) for shape in shapes]


NAMES = sorted(SPECS)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes_at_any_size(trt: Any, name: str) -> None:
    spec = SPECS[name]
    attributes, shapes = example(spec)
    for dtype in spec.dtypes:
        node = tensorrt_double.Node(trt, spec, attributes, dtype, shapes)
        expected = [tensorrt_double.DTYPES[dtype if t.dtype == "T" else t.dtype] for t in spec.outputs]
        assert [found.name for found in node.output_dtypes] == expected
    for base in SIZES:
        sizes = sizes_of(shapes, spec, base)
        binding = spec.bind(numbers(shapes, sizes), attributes, "float16")
        assert node.output_shapes(sizes) == binding.output_shapes


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_that_may_stand_together(trt: Any, name: str) -> None:
    spec = SPECS[name]
    attributes, shapes = example(spec)
    node = tensorrt_double.Node(trt, spec, attributes, "float16", shapes)
    tensors = (*spec.inputs, *spec.outputs)
    of_model = spec.dtypes if any(tensor.dtype == "T" for tensor in tensors) else ("float32",)
    expected = [[tensorrt_double.DTYPES[d if t.dtype == "T" else t.dtype] for t in tensors] for d in of_model]
    assert node.combinations() == expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_that_is_handed_over(trt: Any, name: str, dtype: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    attributes, shapes = example(spec)
    launch_at = tensorrt_double.Node(trt, spec, attributes, dtype, shapes).prepare()
    for base in SIZES:
        sizes = sizes_of(shapes, spec, base)
        launch = launch_at(sizes)
        binding = spec.bind(numbers(shapes, sizes), attributes, dtype)
        record = compile_one(binding, ARCH).record
        assert launch.grid == binding.grid(binding.tile(ARCH))
        assert launch.scalars == binding.scalars
        assert launch.block == (record.threads, 1, 1)
        assert launch.shared_memory_bytes == record.shared_memory_bytes
        assert launch.entry == record.entry
    check_ptx(
        launch.ptx, launch.entry, len(spec.inputs) + len(spec.scalars) + len(spec.outputs), record.threads, tmp_path
    )


def check_ptx(ptx: str, entry: str, parameters: int, threads: int, folder: Path) -> None:
    """TensorRT passes inputs, scalars and outputs, and nothing else; ptxas must take the text."""
    header = re.search(rf"\.visible \.entry {entry}\((.*?)\)(.*?)\{{", ptx, re.DOTALL)
    assert header is not None
    assert len(re.findall(r"\.param", header[1])) == parameters
    assert re.search(rf"\.reqntid {threads}\b", header[2])
    from triton.backends.nvidia.compiler import get_ptxas

    (folder / "kernel.ptx").write_text(ptx)
    tool = get_ptxas(ARCH).path
    command = [tool, f"-arch=sm_{ARCH}", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_an_open_size_that_a_kernel_needs_at_compile_time_is_named(trt: Any) -> None:
    spec = SPECS["CDMoERoute"]
    attributes, shapes = example(spec)
    shapes[0][2] = "width"
    node = tensorrt_double.Node(trt, spec, attributes, "float16", shapes)
    with pytest.raises(Exception, match=r"router_width .* must be a number when the engine is built"):
        node.prepare()


@dataclass(frozen=True)
class Run:
    """A node of an operator, its chain launched as TensorRT was told to."""

    operator: OperatorPlugin
    attributes: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def __call__(self, trt: Any) -> torch.Tensor:
        values = dict(self.tensors)
        for step in self.operator.chain(self.attributes, frozenset(values)):
            values.update(zip(step.outputs, self._launch(trt, step, values), strict=True))
        return values["output"]

    def _launch(self, trt: Any, step: Any, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        spec: PluginSpec = step.spec
        inputs = [values[name].contiguous() for name in step.inputs]
        static = set(spec.static)
        sizes: dict[str, int] = {}
        shapes: list[list[int | str]] = []
        for tensor, data in zip(spec.inputs, inputs, strict=True):
            shape: list[int | str] = []
            for axis, (size, number) in enumerate(zip(tensor.shape, data.shape, strict=True)):
                name = str(size) if getattr(size, "operation", "") == "symbol" else f"{tensor.name}_{axis}"
                fixed = isinstance(size, int) or name in static
                shape.append(number if fixed else name)
                sizes[name] = number
            shapes.append(shape)
        launch = tensorrt_double.Node(trt, spec, step.attributes, "float32", shapes).prepare()(sizes)
        dtypes = {"T": torch.float32}
        outputs = []
        for output, size in zip(spec.outputs, launch.output_shapes, strict=True):
            dtype = dtypes.get(output.dtype) or getattr(torch, output.dtype)
            outputs.append(torch.full(size, float("nan") if dtype.is_floating_point else -(2**31), dtype=dtype))
        binding = spec.bind([tuple(data.shape) for data in inputs], step.attributes, "float32")
        constants = compile_one(binding, ARCH).record.constants
        spec.load_kernel()[launch.grid](*inputs, *launch.scalars, *outputs, **constants)
        return outputs


def attention_run(rows: int, slots: int, window: int) -> Run:
    generator = torch.Generator().manual_seed(rows + slots)
    tensors = {
        "query": torch.randn(2, 4, rows, 32, generator=generator),
        "key": torch.randn(2, 2, slots, 32, generator=generator),
        "value": torch.randn(2, 2, slots, 32, generator=generator),
        "score": torch.rand(2, 2, slots, 1, generator=generator),
        "first_slot": torch.tensor([slots - rows, max(slots - rows - 3, 0)]),
    }
    assert ATTENTION is not None
    return Run(ATTENTION, {"keep_window_size": window, "scale": 0.17}, tensors)


@pytest.mark.parametrize(
    ("rows", "slots", "window"),
    [(1, 63, 0), (1, 300, 0), (1, 257, 16), (1, 300, 200), (8, 40, 16), (9, 40, 16), (17, 17, 16), (65, 70, 0)],
    ids=lambda number: str(number),
)
def test_attention_at_these_launches_is_the_oracle(trt: Any, rows: int, slots: int, window: int) -> None:
    run = attention_run(rows, slots, window)
    expected = dynamic_mask_attention(*run.tensors.values(), None, window, 0.17)
    torch.testing.assert_close(run(trt), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("routing", ["reference", "per-token"])
def test_cdmoe_at_these_launches_is_the_oracle(trt: Any, routing: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "hidden": torch.randn(2, 3, 48, generator=generator),
        "router_logits": torch.randn(2, 3, 16, generator=generator),
        "down_embed": torch.randn(64, 48, generator=generator),
        "up_embed": torch.randn(64, 48, generator=generator),
    }
    attributes = {"num_experts_per_tok": 4, "norm_topk_prob": 0, "routing": routing, "activation": "silu"}
    expected = cdmoe(*tensors.values(), [], 4, False, routing, "silu")
    assert MOE is not None
    torch.testing.assert_close(Run(MOE, attributes, tensors)(trt), expected, rtol=0, atol=5e-5)


def graphs() -> Iterator[tuple[str, ir.Model]]:
    yield "attention", attention_graph(window=16)
    yield "moe", moe_graph()


@pytest.mark.parametrize(("name", "model"), list(graphs()), ids=lambda value: value if isinstance(value, str) else "")
def test_nvidias_parser_finds_the_plugins_of_a_lowered_graph(trt: Any, name: str, model: ir.Model) -> None:
    """By operator, version and namespace. TensorRT-RTX's parser then says that it adds no such plugin, and stops."""
    lowered = PluginChainPass(installed())(model).model
    (found,) = parser_errors(trt, lowered)
    assert "registered with an IPluginCreatorV3One creator only" in found
    next(iter(lowered.graph)).op_type = "DynamicMaskSelct"
    (absent,) = parser_errors(trt, lowered)
    assert "Plugin not found" in absent


def parser_errors(trt: Any, model: ir.Model) -> list[str]:
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert not parser.parse(ir.to_proto(model).SerializeToString())
    return [parser.get_error(index).desc() for index in range(parser.num_errors)]

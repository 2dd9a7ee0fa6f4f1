"""How each weight format stores numbers, and that a new one is one file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from bundles import broken_copy, make_bundle
from onnx import helper
from onnx.reference import ReferenceEvaluator

import doge_deploy.graph.weight_formats as package
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.headers import read_header
from doge_deploy.cli.main import run_command
from doge_deploy.dtypes import DTYPES, NAMES
from doge_deploy.errors import UsageError
from doge_deploy.graph.weight_file import TRANSPOSED_SUFFIX, read_weight_file
from doge_deploy.graph.weight_formats import WeightFormat, find_weight_format, format_of, weight_formats
from doge_deploy.graph.weight_formats._base import as_array
from doge_deploy.graph.weight_formats._blocks import BlockFormat
from doge_deploy.graph.weight_formats.int4 import Format
from doge_deploy.graph.weights import packed
from doge_deploy.options.export import ExportOptions, load_export_options
from doge_deploy.options.words import weight_format_names
from doge_deploy.verify.run import verify


def blocks(bits: int, block_size: int, symmetric: bool) -> BlockFormat:
    found = format_of(ExportOptions(quantize=f"int{bits}", block_size=block_size, symmetric=symmetric))
    assert isinstance(found, BlockFormat)
    return found


FORMATS = {
    f"{bits}-bits-{block}-{'symmetric' if symmetric else 'asymmetric'}": blocks(bits, block, symmetric)
    for bits in (4, 8)
    for block in (16, 32)
    for symmetric in (True, False)
}


@pytest.mark.parametrize("stored_as", FORMATS.values(), ids=FORMATS.keys())
def test_error_is_at_most_what_rounding_and_clipping_give(stored_as: BlockFormat) -> None:
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    result = stored_as.store(weight)
    assert int(result["values"].max()) < stored_as.levels
    error = (stored_as.dequantized(weight) - weight).abs().reshape(7, -1, stored_as.block_size)
    step = result["scale"].abs()[..., None]
    largest = weight.abs().reshape(error.shape).amax(-1, keepdim=True)
    shrunk = 0.3 * largest if stored_as.bits == 4 else 0.0
    assert (error <= 1.01 * (step + shrunk)).all()
    assert error.square().mean() < (step / 2).square().mean()
    assert ("zero_point" in result) is not stored_as.symmetric


@pytest.mark.parametrize("stored_as", FORMATS.values(), ids=FORMATS.keys())
def test_zero_and_constant_blocks(stored_as: BlockFormat) -> None:
    weight = torch.cat((torch.zeros(1, 32), torch.full((1, 32), -0.5), torch.full((1, 32), 3.0)))
    torch.testing.assert_close(stored_as.dequantized(weight), weight, rtol=1e-6, atol=0)


def test_trying_ranges_is_never_worse() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    largest = weight.reshape(64, 2, 32).abs().amax(-1)
    plain = (largest / 7)[..., None]
    rounded = torch.clamp(torch.round(weight.reshape(64, 2, 32) / plain), -8, 7) * plain
    assert (blocks(4, 32, True).dequantized(weight) - weight).square().sum() < (
        rounded.reshape(64, 64) - weight
    ).square().sum()


def test_the_first_of_two_numbers_is_the_low_half() -> None:
    values = torch.tensor([[1, 2, 3], [4, 5, 15]], dtype=torch.uint8)
    assert packed(values, 4).tolist() == [0x21, 0x43, 0xF5]
    assert packed(values, 8) is values
    with pytest.raises(ValueError, match="2 bits"):
        packed(values, 2)


@pytest.mark.parametrize(
    ("columns", "block_size", "block"),
    [(256, 128, 128), (512, 32, 32), (64, 128, 64), (192, 128, 64), (48, 32, 16), (16, 16, 16), (40, 32, None)],
)
def test_rows_get_the_largest_block_that_divides_them(columns: int, block_size: int, block: int | None) -> None:
    stored_as = blocks(8, block_size, True)
    assert stored_as.block(columns) == block
    weight = torch.ones(3, columns)
    if block is None:
        assert stored_as.refusal("x.weight", (3, columns)) == f"its rows of {columns} numbers are no multiple of 16"
        with pytest.raises(ValueError, match=f"rows of {columns} numbers are no multiple of 16"):
            stored_as.store(weight)
    else:
        assert stored_as.store(weight)["scale"].shape == (3, columns // block)


def signed(dtype: str, block_size: int = 32) -> Format:
    found = format_of(ExportOptions(quantize="int4", dtype=dtype, block_size=block_size))
    assert isinstance(found, Format)
    return found


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-7, 1e4])
def test_signed_numbers_have_positive_scales_and_exact_products(dtype: str, size: float) -> None:
    """What a runtime rounds after the product, or does not, makes no difference."""
    weight = size * torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    weight[0], weight[1, :32] = 0, -size
    stored_as = signed(dtype)
    parts = stored_as.store(weight)
    assert parts["values"].dtype == torch.int8 and parts["scale"].dtype == getattr(torch, NAMES[dtype])
    assert int(parts["values"].min()) >= -8 and int(parts["values"].max()) <= 7
    assert (parts["scale"] > 0).all() and (parts["scale"][0] == 1).all()
    found = stored_as.dequantized(weight)
    assert torch.equal(found, found.to(parts["scale"].dtype).float())
    assert torch.equal(found[0], torch.zeros(64))
    if size > 1e-6:  # below, fp16 itself has few bits
        assert (found - weight).square().mean() < 0.02 * weight.square().mean()
        torch.testing.assert_close(found[1, :32], weight[1, :32], rtol=0.05, atol=0)


def test_the_largest_scale_does_not_leave_the_range() -> None:
    weight = torch.tensor([[65504.0, -65504.0] * 16])
    found = signed("fp16").dequantized(weight)
    assert torch.isfinite(found.half()).all() and (found.abs() > 57000).all()


def test_scales_are_those_of_least_squared_error() -> None:
    """No other scale, for which the numbers are rounded anew, is much better; that of the largest number is worse."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).reshape(64, 2, 32)

    def error(scale: torch.Tensor) -> torch.Tensor:
        rounded = torch.clamp(torch.round(weight / scale), -8, 7) * scale
        return (rounded - weight).square().sum(-1, keepdim=True)

    found = (signed("fp16").dequantized(weight.reshape(64, 64)).reshape(weight.shape) - weight).square()
    whole = weight.abs().amax(-1, keepdim=True) / 7
    best = torch.stack([error(whole * part) for part in torch.linspace(0.4, 1.1, 400)]).amin(0)
    assert float(found.sum()) < 1.01 * float(best.sum())
    assert float(found.sum()) < 0.9 * float(error(whole).sum())


def test_no_zero_points_in_half_precision() -> None:
    with pytest.raises(UsageError, match=r"symmetric=False with dtype=fp16: zero points are for graphs .* in fp32"):
        format_of(ExportOptions(quantize="int4", dtype="fp16", symmetric=False))
    assert "fp32" in signed("fp16").dtypes


EVERY = [
    {"quantize": "fp16"},
    *({"quantize": kind, "dtype": dtype} for kind in ("int4", "fp8", "nvfp4") for dtype in ("fp16", "bf16")),
    *({"quantize": f"int{bits}", "symmetric": symmetric} for bits in (4, 8) for symmetric in (True, False)),
]


@pytest.mark.parametrize("transposed", [False, True], ids=["as-stored", "transposed"])
@pytest.mark.parametrize("options", EVERY, ids=str)
def test_the_nodes_compute_what_the_reference_says(options: dict[str, Any], transposed: bool) -> None:
    """The rewritten graph in onnx's evaluator, its parts filled from `store`, against `dequantize` in NumPy."""
    stored_as = format_of(ExportOptions(**options))
    assert stored_as is not None
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    name = "layers.0.q_proj.weight"  # what nvfp4 stores in its own form
    model = matrix_product(name + TRANSPOSED_SUFFIX * transposed, transposed, NAMES[stored_as_dtype(options)])
    value = next(iter(model.graph.initializers.values()))
    stored_as.rewrite(model.graph, value, name, transposed=transposed)
    parts = stored_as.store(weight, name)
    for initializer_name, initializer in model.graph.initializers.items():
        assert initializer.dtype is not None and initializer.shape is not None
        part = stored_as.part_of(initializer_name, initializer.dtype.name.lower())
        assert part is not None and part.tensor in (name, "")
        data = parts[part.key] if part.tensor else stored_as.constant(part.key)
        assert tuple(data.shape) == initializer.shape.numpy()
        raw = packed(data, DTYPES[part.dtype].bits).contiguous().reshape(-1).view(torch.uint8)
        initializer.const_value = ir.from_proto(
            onnx.helper.make_tensor(
                initializer_name, int(initializer.dtype), list(data.shape), raw.numpy().tobytes(), raw=True
            )
        )
    expected = stored_as.dequantize({key: as_array(data) for key, data in parts.items()})
    state = np.eye(32).astype(helper.tensor_dtype_to_np_dtype(DTYPES[stored_as.dtype].onnx_number))
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": state})  # type: ignore[misc]
    assert np.array_equal(found.astype(np.float32), expected.T)
    assert not np.array_equal(expected, weight.numpy()), "the format rounds"


def stored_as_dtype(options: dict[str, Any]) -> str:
    return str(options.get("dtype", "fp32"))


def matrix_product(name: str, transposed: bool, dtype: str) -> ir.Model:
    """`[32, 32] @ w.T`, w `[6, 32]` stored as it is or transposed."""
    kind = ir.DataType(DTYPES[dtype].onnx_number)
    x = ir.val("x", kind, ir.Shape([32, 32]))
    shape = (32, 6) if transposed else (6, 32)
    weight = ir.val(name, kind, ir.Shape(shape))
    nodes = [] if transposed else [ir.node("Transpose", [weight], {"perm": [1, 0]})]
    right = weight if transposed else nodes[0].outputs[0]
    nodes.append(ir.node("MatMul", [x, right]))
    nodes[-1].outputs[0].name = "y"
    if not transposed:
        right.name = "wt"
    graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=[weight], opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_bytes_are_those_of_the_weight_file(options: dict[str, Any], tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle("doge-tiny-moe", tmp_path / "b", max_length=32, **options))
    stored_as = format_of(bundle.manifest.options)
    assert stored_as is not None
    found: dict[str, int] = {}
    for name, info in read_weight_file(bundle.path).items():
        part = stored_as.part_of(name, info.dtype)
        if part is not None and part.tensor:
            found[part.tensor] = found.get(part.tensor, 0) + info.nbytes
    shapes = {name: info.shape for name, info in open_checkpoint("doge-tiny-moe").tensors.items()}
    taken = {name: shape for name, shape in shapes.items() if not stored_as.refusal(name, shape)}
    assert found == {name: stored_as.stored_bytes(name, (shape[0], shape[1])) for name, shape in taken.items()}
    assert set(stored_as.range_dtypes(shapes)) == taken.keys()


def test_formats_are_found_without_anything_heavy() -> None:
    code = (
        "import sys\n"
        "from doge_deploy.graph.weight_formats import weight_formats\n"
        "print(*weight_formats())\n"
        "assert not {'torch', 'onnx', 'onnx_ir', 'numpy', 'pydantic'} & sys.modules.keys()"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert tuple(output.split()) == weight_format_names() == ("fp16", "fp8", "int4", "int8", "nvfp4")


def test_a_format_is_called_like_its_file() -> None:
    for name, known in weight_formats().items():
        assert known.name == name
        assert known.title and known.quality.reason
        assert known.default_block_size in (known.block_sizes or (None,))
        assert known.targets <= {"ort", "trt", "trt-rtx", "torch-kernels"}


def test_every_format_has_its_row_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantize.md").read_text(encoding="utf-8")
    assert [name for name in weight_format_names() if f"| `{name}` |" not in page] == []


def test_what_a_format_refuses() -> None:
    with pytest.raises(UsageError, match="block_size=48 with quantize=int8: must be one of 16, 32, 64, 128, 256"):
        format_of(ExportOptions(quantize="int8", block_size=48))
    with pytest.raises(UsageError, match="quantize=int3: must be one of fp16, fp8, int4, int8, nvfp4"):
        find_weight_format("int3")
    with pytest.raises(
        UsageError, match="--quantize: quantize='int3': must be one of fp16, fp8, int4, int8, nvfp4, or null"
    ):
        load_export_options(None, {"quantize": "int3"}, [])
    assert format_of(ExportOptions()) is None


TOY = '''
"""8 bits, one scale a weight."""

import numpy as np

from doge_deploy.graph.weight_formats._base import Part, PartSource, Quality, WeightFormat, add_part, replace_weight


class Format(WeightFormat):
    name = "toy8"
    title = "8 bits, one scale a weight"
    quality = Quality(0.05, 1.1, 0.9, "a toy")

    def parts(self, name, shape):
        return {"values": Part(name + ".i8", "int8", shape), "scale": Part(name + ".step", "float32", ())}

    def part_of(self, initializer, dtype):
        for key, suffix, part_dtype in (("values", ".i8", "int8"), ("scale", ".step", "float32")):
            if initializer.endswith(suffix):
                return PartSource(initializer.removesuffix(suffix), key, part_dtype)
        return None

    def store(self, weight, name=""):
        scale = weight.float().abs().amax() / 127
        return {"values": (weight.float() / scale).round().char(), "scale": scale}

    def dequantize(self, parts):
        return parts["values"].astype(np.float32) * parts["scale"]

    def rewrite(self, graph, weight, name, *, transposed):
        import onnx_ir as ir

        shape = weight.shape.numpy()[::-1] if transposed else weight.shape.numpy()
        values, scale = [add_part(graph, part) for part in self.parts(name, shape).values()]
        wide = ir.node("Cast", [values], {"to": ir.DataType.FLOAT})
        product = ir.node("Mul", [wide.outputs[0], scale])
        replace_weight(graph, weight, [wide, product], name, transposed=transposed)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A format that is one file, found where the package looks for its modules."""
    folder = tmp_path / "formats"
    folder.mkdir()
    (folder / "toy8.py").write_text(TOY)
    package.__path__.append(str(folder))
    yield "toy8"
    package.__path__.remove(str(folder))
    sys.modules.pop(f"{package.__name__}.toy8", None)
    vars(package).pop("toy8", None)


def test_a_new_format_is_one_file(toy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, bundle, report = "doge-tiny-moe", tmp_path / "bundle", tmp_path / "report.json"
    options = ["--set", f"quantize={toy}", "--max-length", "48"]
    assert run_command(["export", name, "-o", str(bundle), *options]) == 0
    assert "toy8 weights" in capfd.readouterr().out
    assert run_command(["verify", str(bundle), "--greedy-steps", "4", "--json", str(report)]) == 0
    quality = json.loads(report.read_text())["quality"]
    assert quality[0]["passed"] and 0 < quality[0]["mean_kl"] < 0.05
    assert run_command(["inspect", str(bundle)]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "weights toy8 (8 bits, one scale a weight)" in shown
    assert "is not quantized: it decides which keys are kept" in shown
    assert run_command(["build", str(bundle), "--target", "trt-rtx"]) in (3, 4)
    opened = open_bundle(bundle)
    stored = {name for name, info in read_weight_file(opened.path).items() if info.dtype == "I8"}
    assert "model.embed_tokens.weight.i8" in stored
    shapes = {name.removesuffix(".i8"): read_weight_file(opened.path)[name].nbytes for name in stored}
    checkpoint = open_checkpoint(name)
    assert shapes == {name: math.prod(checkpoint.tensors[name].shape) for name in shapes}


def test_a_wrong_weight_of_a_new_format_is_found(toy: str, tmp_path: Path) -> None:
    bundle = make_bundle("doge-tiny", tmp_path / "b", quantize=toy, max_length=32)

    def damage(path: Path) -> None:
        info = read_header(path)["model.layers.1.mlp.up_proj.weight.i8"]
        data = bytearray(path.read_bytes())
        for place in range(info.offset, info.offset + info.nbytes):
            data[place] ^= 0x40
        path.write_bytes(data)

    report = verify(broken_copy(bundle, tmp_path / "c", weights=damage), greedy_steps=2)
    assert {"weights", "static/quality"} <= set(report.failed_cases)


def test_a_format_that_lacks_an_answer_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        WeightFormat()  # type: ignore[abstract]

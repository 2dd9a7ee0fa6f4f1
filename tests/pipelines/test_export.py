"""Exports: the same bytes, whole or not at all, and what is in them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from bundles import NoProgress, make_bundle
from random_doge import random_doge
from safetensors import safe_open

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.options.export import ExportOptions
from doge_deploy.pipelines import export as export_module


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def operators(model: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(model, load_external_data=False).graph.node)


def test_the_same_input_gives_the_same_bytes(moe_doge: Path, tmp_path: Path) -> None:
    options = {"kv_cache": ("static", "growing")}
    first, second = (make_bundle(moe_doge, tmp_path / name, **options) for name in ("first", "second"))
    assert files(first) == files(second)


def test_nothing_of_the_machine_is_in_the_bundle(moe_doge: Path, tmp_path: Path) -> None:
    bundle = make_bundle(moe_doge, tmp_path / "bundle", kv_cache=("static", "growing"))
    for name, data in files(bundle).items():
        for trace in (str(Path.cwd()), str(tmp_path), "site-packages", "stack_trace"):
            assert trace.encode() not in data, f"{name} holds {trace!r}"


def test_two_layouts_share_one_weight_file(tiny_bundle: Path) -> None:
    assert {p.suffix for p in tiny_bundle.iterdir() if "weights" in p.name} == {".safetensors"}
    locations, names = set(), []
    for layout in open_bundle(tiny_bundle).manifest.layouts.values():
        graph = onnx.load(tiny_bundle / layout.file, load_external_data=False).graph
        stored = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        locations |= {entry.value for t in stored for entry in t.external_data if entry.key == "location"}
        names.append({t.name for t in stored})
    assert locations == {"weights.safetensors"}
    assert names[0] == names[1]
    with safe_open(tiny_bundle / "weights.safetensors", framework="np") as file:
        assert set(file.keys()) == names[0]
        assert "lm_head.weight" not in " ".join(file.keys()), "a tied embedding is stored once"


@pytest.mark.parametrize("layout", ["static", "growing"])
def test_operators_per_layer(tiny_moe_bundle: Path, layout: str) -> None:
    opened = open_bundle(tiny_moe_bundle)
    layers = opened.manifest.facts.num_hidden_layers
    count = operators(tiny_moe_bundle / opened.layout(layout).file)
    assert count["DynamicMaskAttention"] == count["CDMoE"] == layers
    assert count["RMSNormalization"] == 4 * layers + 1
    assert count["RotaryEmbedding"] == 2 * layers
    assert count["TensorScatter"] == (3 * layers if layout == "static" else 0)
    assert count["Transpose"] <= 6 * layers + 1, "weights are stored the way MatMul reads them"
    model = onnx.load(tiny_moe_bundle / opened.layout(layout).file, load_external_data=False)
    assert {(f.domain, f.name) for f in model.functions} == {("doge", "DynamicMaskAttention"), ("doge", "CDMoE")}
    assert {o.domain: o.version for o in model.opset_import} == {"": 24, "doge": 1}


def body(bundle: Path) -> Counter[str]:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    (function,) = (f for f in model.functions if f.name == "DynamicMaskAttention")
    return Counter(node.op_type for node in function.node)


def test_topk_is_left_out_where_the_cache_cannot_exceed_the_window(dense_doge: Path, tmp_path: Path) -> None:
    short = make_bundle(dense_doge, tmp_path / "short", max_length=8)
    layout = open_bundle(short).layout()
    assert (body(short)["TopK"], layout.keep_window) == (0, False)
    assert "keep_window_size=8" in layout.notes[0]
    long = make_bundle(dense_doge, tmp_path / "long", max_length=9)
    assert (body(long)["TopK"], open_bundle(long).layout().keep_window) == (1, True)


def test_no_sum_of_all_pairs_of_keys_is_formed(tiny_moe_bundle: Path) -> None:
    model = onnx.load(tiny_moe_bundle / "model.onnx", load_external_data=False)
    (function,) = (f for f in model.functions if f.name == "CDMoE")
    ranks = [a.ints for n in function.node for a in n.attribute if n.output[0] == "rank_x" and a.name == "value_ints"]
    assert len(ranks[0]) == 20  # (i+1)*(j+1) <= 8, where 16*16 pairs exist


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_scores_are_float32_in_every_dtype(dense_doge: Path, tmp_path: Path, dtype: str) -> None:
    bundle = make_bundle(dense_doge, tmp_path / dtype, dtype=dtype)
    specs = {spec.name: spec.dtype for spec in open_bundle(bundle).layout().signature.inputs}
    assert specs["past_key_values.0.score"] == "float32"
    assert specs["past_key_values.0.key"] == {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    with safe_open(bundle / "weights.safetensors", framework="pt") as file:
        assert str(file.get_tensor("model.layers.0.self_attn.A").dtype) == "torch.float32"
        assert str(file.get_tensor("model.norm.weight").dtype) != "torch.float32"


def test_first_layers_only(dense_doge: Path, tmp_path: Path) -> None:
    bundle = make_bundle(dense_doge, tmp_path / "one", num_layers=1)
    assert operators(bundle / "model.onnx")["DynamicMaskAttention"] == 1
    assert run_command(["verify", str(bundle), "--reference", str(dense_doge), "--greedy-steps", "4"]) == 0


@pytest.mark.parametrize(("length", "memory"), [(None, False), (512, False), (513, True)])
def test_rope_has_a_memory_only_beyond_its_length(tmp_path: Path, length: int | None, memory: bool) -> None:
    """doge-tiny has rope_type dynamic and an original length of 512."""
    layout = open_bundle(make_bundle("doge-tiny", tmp_path / "bundle", max_length=length)).layout()
    assert layout.signature.remembers_rope is memory
    with safe_open(tmp_path / "bundle" / "weights.safetensors", framework="pt") as file:
        assert ("rope_frequencies" in file.keys()) is memory  # noqa: SIM118
        assert ("rope_cos" in file.keys()) is not memory  # noqa: SIM118


def test_existing_output_is_replaced_only_with_force(dense_doge: Path, tmp_path: Path) -> None:
    output = make_bundle(dense_doge, tmp_path / "bundle")
    with pytest.raises(UsageError, match="exists; choose another --output, or replace it with --force"):
        make_bundle(dense_doge, output)
    options = ExportOptions(max_length=16)
    export_module.export(str(dense_doge), output, options, force=True, progress=NoProgress())
    assert open_bundle(output).manifest.max_length == 16
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_force_does_not_replace_what_is_not_a_bundle(dense_doge: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not a bundle; --force replaces only bundles"):
        export_module.export(str(dense_doge), tmp_path / "thesis", ExportOptions(), force=True, progress=NoProgress())
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_a_failed_export_leaves_the_old_bundle_and_nothing_else(
    dense_doge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_bundle(dense_doge, tmp_path / "bundle")
    before = files(output)

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(export_module, "file_entries", fail)
    with pytest.raises(OSError, match="disk full"):
        export_module.export(str(dense_doge), output, ExportOptions(), force=True, progress=NoProgress())
    assert files(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    output = tmp_path / "bundle"
    arguments = [sys.executable, "-m", "doge_deploy.cli", "export", "doge-tiny", "-o", str(output)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_unwritable_output_is_one_line(dense_doge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(["export", str(dense_doge), "-o", str(tmp_path / "file" / "bundle")]) == 2
    assert "cannot be written: " in capfd.readouterr().err


def test_config_file_and_set(dense_doge: Path, tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "export_configs" / "huggingface.yaml"
    arguments = [
        "export",
        str(dense_doge),
        "-o",
        str(tmp_path / "b"),
        "--config",
        str(config),
        "--set",
        "max_length=32",
    ]
    assert run_command(arguments) == 0
    manifest = open_bundle(tmp_path / "b").manifest
    assert list(manifest.layouts) == ["growing"]
    assert manifest.max_length == 32
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["options"]["logits"] == "all"


@pytest.mark.parametrize("options", [{"quantize": "fp16", "block_size": 64}, {"symmetric": False}], ids=str)
def test_blocks_without_weights_of_few_bits(options: dict[str, Any], dense_doge: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(block_size=64 with quantize=fp16|symmetric=False with no quantize): only"):
        make_bundle(dense_doge, tmp_path / "b", **options)


def test_weights_too_large_for_half_precision(tmp_path: Path) -> None:
    model = random_doge()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(UnsupportedModelError, match=r"up_proj.weight has values up to 100000, beyond float16's 65504"):
        make_bundle(tmp_path / "checkpoint", tmp_path / "b", quantize="fp16")


def test_scores_are_judged_in_the_dtype_of_the_export(tmp_path: Path) -> None:
    """An exponent of 20.8 in every row: float32 holds its power, float16 nothing beyond exp(11.09)."""
    model = random_doge()
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        attention.A.fill_(30.0)
        attention.dt_proj.weight.zero_()
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(UnsupportedModelError, match="the dynamic mask's score overflows float16"):
        make_bundle(tmp_path / "checkpoint", tmp_path / "half", dtype="fp16")
    assert not open_bundle(make_bundle(tmp_path / "checkpoint", tmp_path / "whole")).manifest.warnings


def test_what_stays_in_float32_may_exceed_half_precision(tmp_path: Path) -> None:
    model = random_doge()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    model.save_pretrained(tmp_path / "checkpoint")
    assert make_bundle(tmp_path / "checkpoint", tmp_path / "b", quantize="fp16").is_dir()


def test_half_weights_halve_the_file(tmp_path: Path) -> None:
    sizes = {
        quantize: (
            make_bundle("doge-tiny-moe", tmp_path / str(quantize), quantize=quantize, max_length=32)
            / "weights.safetensors"
        )
        .stat()
        .st_size
        for quantize in (None, "fp16")
    }
    assert sizes["fp16"] < 0.55 * sizes[None]

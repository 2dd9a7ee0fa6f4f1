"""Ahead-of-time compilation: for real, without a GPU; few kernels, for it takes seconds each."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from doge_deploy.cli.main import run_command
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.kernels import compile as compile_module
from doge_deploy.kernels.compile import Compiled, CompileError, compile_all, compile_one
from doge_deploy.kernels.compile_worker import strip_unused_parameters
from doge_deploy.kernels.devices import DEVICES, parse_arch
from doge_deploy.kernels.launch import run_kernel
from doge_deploy.kernels.registry import installed
from doge_deploy.kernels.samples import bindings, published
from doge_deploy.kernels.spec import Binding, Tile

pytest.importorskip("triton", reason="kernels need Triton, which exists for Linux only")


def binding(name: str, head_dim: int = 64, dtype: str = "float16") -> Binding:
    return next(iter(bindings(installed(), published(head_dim), dtype, frozenset([name]))))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def routed(cache: Path) -> Compiled:
    return compile_one(binding("CDMoERoute"), 87, cache=cache)


def test_a_record_says_how_to_launch(routed: Compiled) -> None:
    record = routed.record
    assert record.plugin == "doge::CDMoERoute"
    assert record.signature == (
        ("router_logits", "*fp16"), ("num_tokens", "i32"), ("expert_ids", "*i32"), ("expert_weights", "*fp32"),
    )  # fmt: skip
    assert record.grid == ("B * Q", "1", "1")
    assert record.threads == 128
    assert 0 < record.registers <= 255
    assert record.spill_bytes == 0
    assert record.constants["KEYS"] == 32
    assert f".visible .entry {record.entry}(" in routed.ptx


def test_ptx_takes_the_arguments_of_the_signature_and_no_others(routed: Compiled) -> None:
    parameters = re.findall(r"\.param \.(\w+) ", routed.ptx)
    assert parameters == ["u64" if type_[0] == "*" else "u32" for _, type_ in routed.record.signature]


def test_ptx_holds_nothing_of_this_machine(routed: Compiled) -> None:
    assert os.getcwd() not in routed.ptx
    assert ".loc" not in routed.ptx and ".file" not in routed.ptx
    assert f".version {routed.record.ptx_version // 10}.{routed.record.ptx_version % 10}" in routed.ptx
    assert ".target sm_87" in routed.ptx


def test_the_same_input_gives_the_same_bytes(routed: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, from another directory, with another order of Python's sets, without the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "elsewhere"))
    again = compile_one(binding("CDMoERoute"), 87, cache=tmp_path)
    assert again == routed


def test_a_result_is_taken_from_the_cache_unless_it_is_damaged(
    routed: Compiled, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object) -> None:
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr("doge_deploy.kernels.compile._Workers.compile", no_compiler)
        assert compile_one(binding("CDMoERoute"), 87, cache=cache) == routed
        for file in cache.rglob("kernel.ptx"):
            file.write_text("damaged")
        with pytest.raises(AssertionError, match="compiled again"):
            compile_one(binding("CDMoERoute"), 87, cache=cache)
    assert compile_one(binding("CDMoERoute"), 87, cache=cache) == routed


@pytest.mark.parametrize("arch", [75, 121])
def test_the_oldest_and_the_newest_device(cache: Path, arch: int) -> None:
    record = compile_one(binding("DynamicMaskSplitSelected"), arch, cache=cache).record
    assert record.spill_bytes == 0
    assert record.shared_memory_bytes <= 48 * 1024


def test_a_kernel_that_does_not_fit_a_device_is_refused(cache: Path) -> None:
    wide = Tile({"BLOCK_ROWS": 8, "PACK": 2, "BLOCK_KEYS": 256, "BLOCK_D": 256}, num_warps=4, num_stages=2)
    small = binding("DynamicMaskSplitSelected", head_dim=256)
    large = dataclasses.replace(small, spec=dataclasses.replace(small.spec, tiler=lambda *_: wide))
    with pytest.raises(CompileError, match=r"SplitSelected for sm_86 in float16: needs \d+ bytes of shared memory"):
        compile_one(large, 86, cache=cache)


def test_a_kernel_that_does_not_compile_is_one_line(cache: Path) -> None:
    broken = binding("CDMoERoute")
    odd = dataclasses.replace(
        broken, spec=dataclasses.replace(broken.spec, tiler=lambda *_: Tile({"BLOCK_KEYS": 3, "BLOCK_CANDIDATES": 64}))
    )
    with pytest.raises(CompileError, match="power of 2") as error:
        compile_one(odd, 87, cache=cache)
    assert "\n" not in str(error.value)


def test_bfloat16_is_refused_where_there_is_none(cache: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="sm_75 has no bfloat16"):
        list(compile_all([(binding("CDMoERoute", dtype="bfloat16"), 75)], cache=cache))


@pytest.mark.parametrize("text", ["sm_87", "SM87", "8.7", "87", "sm_87a"])
def test_ways_to_name_a_device(text: str) -> None:
    assert parse_arch(text) == 87


@pytest.mark.parametrize("text", ["sm_70", "orin", "", "sm_"])
def test_an_unknown_device_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be one of sm_75, sm_80"):
        parse_arch(text)


def test_parameters_that_are_used_are_not_stripped() -> None:
    head = "\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{\n"
    assert strip_unused_parameters(head, 1) == "\t.param .u64 k_param_0\n)\n{\n"
    with pytest.raises(ValueError, match="uses k_param_1"):
        strip_unused_parameters(head + "ld.param.b64 %r, [k_param_1];", 1)


def test_the_samples_hold_every_kernel() -> None:
    registry = installed()
    found = {bound.spec.name for bound in bindings(registry, published(128), "float16")}
    assert found == {spec.name for spec in registry.specs()}


def test_compile_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--arch", "sm_87", "--head-dim", "64", "--kernel", "DynamicMaskSelect", "-o", str(tmp_path / "out")]
    assert run_command(["plugins", "compile", *arguments]) == 0
    output = capsys.readouterr().out
    assert "DynamicMaskSelect" in output
    assert "1 kernels compiled, 0 of them spill registers" in output
    (record,) = (tmp_path / "out" / "sm_87").glob("*/record.json")
    assert json.loads(record.read_text())["arch"] == 87
    assert (record.parent / "kernel.ptx").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name devices with --arch"),
        (["--all", "--arch", "sm_87"], "name devices with --arch"),
        (["--arch", "sm_1"], "arch='sm_1': must be one of"),
        (["--arch", "sm_87", "--dtype", "int4"], "--dtype int4: must be one of fp32, fp16, bf16"),
        (["--arch", "sm_87", "--head-dim", "big"], "--head-dim big: must be a whole number"),
        (["--arch", "sm_87", "--head-dim", "260"], "D a multiple of 8, at most 256"),
        (["--arch", "sm_87", "--kernel", "Nope"], "kernel='Nope': must be one of CDMoE"),
    ],
    ids=["nothing", "both", "arch", "dtype", "head-dim", "limit", "kernel"],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plugins", "compile", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_devices_have_limits_within_reason() -> None:
    for arch, device in DEVICES.items():
        assert 64 * 1024 <= device.shared_memory_bytes < 228 * 1024, arch
        assert device.ptx_version >= 80


def misread(name: str, *order: int) -> Binding:
    """A kernel whose spec has its outputs in another order than the kernel itself."""
    bound = binding(name)
    outputs = tuple(bound.spec.outputs[place] for place in order)
    return dataclasses.replace(bound, spec=dataclasses.replace(bound.spec, outputs=outputs))


def test_a_kernel_whose_parameters_are_in_another_order_is_refused(cache: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        compile_one(misread("CDMoERoute", 1, 0), 87, cache=cache)
    assert str(caught.value) == (
        "doge::CDMoERoute: parameter 3 of its kernel is 'expert_ids_ptr', must be 'expert_weights_ptr': its spec has "
        "router_logits_ptr, num_tokens, expert_weights_ptr, expert_ids_ptr in this order"
    )
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("call", [compile_one, None], ids=["compiled", "launched"])
def test_constants_are_compared_by_name(call: Callable[..., object] | None, cache: Path) -> None:
    bound = binding("CDMoERoute")
    constants = {"TOPS" if name == "TOP" else name: value for name, value in bound.spec.constants.items()}
    spec = dataclasses.replace(bound.spec, constants=constants)
    with pytest.raises(
        UnsupportedModelError, match=r"constants of its kernel: 'TOP' is not in its spec; the spec's 'TOPS' is not in"
    ):
        if call is not None:
            call(dataclasses.replace(bound, spec=spec), 87, cache=cache)
        else:
            attributes = {"num_experts_per_tok": 2, "norm_topk_prob": 0, "routing": "per-token"}
            run_kernel(spec, [torch.zeros(1, 1, 64)], attributes)


def test_every_kernel_has_the_parameters_of_its_spec() -> None:
    for spec in installed().specs():
        assert list(spec.load_kernel().arg_names[: len(spec.parameters)]) == spec.parameters


def test_compilers_are_not_shared_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many threads gets a process of its own, or waits for none: no request is lost or answered twice."""
    code = (
        "from doge_deploy.process.worker import serve\nimport os, time\n"
        "def answer(request):\n    time.sleep(0.01)\n    return {'x': request['x'], 'pid': os.getpid()}\nserve(answer)"
    )
    monkeypatch.setattr(compile_module, "worker_command", lambda module: [sys.executable, "-c", code])
    workers = compile_module._Workers(tmp_path)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda x: workers.compile({"x": x}, "it"), range(200)))
    finally:
        workers.close()
    assert [answer["x"] for answer in answers] == list(range(200))
    assert 1 <= len({answer["pid"] for answer in answers}) <= 4


def test_the_end_of_a_compilers_log_is_quoted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; print('LLVM ERROR: out of registers', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(compile_module, "worker_command", lambda module: [sys.executable, "-c", code])
    with pytest.raises(
        CompileError,
        match=r"CDMoERoute for sm_89 in float16: the compiler process was ended by signal 6 \(SIGABRT\); its log ends "
        r"with: LLVM ERROR: out of registers$",
    ):
        compile_one(binding("CDMoERoute"), 89, cache=cache)

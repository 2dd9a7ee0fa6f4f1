"""The machine code of the kernels, read without a GPU: what multiplies, how wide loads are, that nothing spills."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from doge_deploy.cli.main import run_command
from doge_deploy.kernels import machine_code as module
from doge_deploy.kernels.compile import Compiled, CompileError, compile_all, compile_one, is_supported
from doge_deploy.kernels.devices import DEVICES
from doge_deploy.kernels.machine_code import MachineCode, machine_code, read
from doge_deploy.kernels.registry import installed
from doge_deploy.kernels.samples import bindings, published
from doge_deploy.kernels.spec import Binding, Tile

pytest.importorskip("triton", reason="kernels need Triton, which exists for Linux only")

PRODUCTS: Mapping[int, frozenset[str]] = {
    # Triton compiles no matrix instruction for 7.5: products run on the cores for single numbers
    75: frozenset(),
    90: frozenset({"HMMA", "HGMMA"}),
    100: frozenset({"HMMA", "UTCHMMA"}),
    110: frozenset({"HMMA", "UTCHMMA"}),
}
"""What multiplies half-precision matrices, by compute capability; HMMA elsewhere."""


ROWS = ("DynamicMaskSplit", "DynamicMaskAttend", "CDMoEExperts")
"""Kernels that read rows of K and V, or of the experts' tables: multiples of 16 bytes at the published sizes. What the
others read are single numbers."""


def widest(binding: Binding, arch: int) -> int:
    """Bits that the widest load must have at least."""
    if not binding.spec.name.startswith(ROWS):
        return 0
    # without asynchronous copies a part's keys are spread over all threads, four halves for each
    return 64 if arch == 75 and binding.spec.name.startswith("DynamicMaskSplit") else 128


def expects(binding: Binding, arch: int, code: MachineCode) -> bool:
    """Whether the kernel multiplies with what the device has for it."""
    legal, used = PRODUCTS.get(arch, frozenset({"HMMA"})), set(code.matrix_products)
    name, single = binding.spec.name, binding.dtype == "float32"
    # ranks are a product of zeros and ones, in half precision whatever the dtype of the model
    multiplies = name.startswith("DynamicMaskSelect") or (name.startswith(ROWS[:2]) and not single)
    return used <= legal and (bool(used) or not legal) if multiplies else not used


def problems(binding: Binding, arch: int, compiled: Compiled, code: MachineCode) -> list[str]:
    """What is wrong with a kernel's machine code, a few words each."""
    found = []
    if not expects(binding, arch, code):
        found.append(f"multiplies with {dict(code.matrix_products)}")
    if code.local_accesses or code.stack_bytes or code.local_bytes:
        found.append(f"{code.local_accesses} accesses of local memory, {code.stack_bytes} bytes of stack")
    if code.widest_load < widest(binding, arch):
        found.append(f"its widest load has {code.widest_load} bits")
    if code.registers != compiled.record.registers:
        found.append(f"{code.registers} registers, the record says {compiled.record.registers}")
    return found


def check(work: list[tuple[Binding, int]], cache: Path | None = None) -> dict[str, list[str]]:
    compiled = zip(work, compile_all(work, cache=cache), strict=True)
    return {
        f"{binding.spec.name} {binding.dtype} sm_{arch}": found
        for (binding, arch), one in compiled
        if (found := problems(binding, arch, one, machine_code(one)))
    }


def named(name: str, dtype: str = "float16") -> Binding:
    return next(iter(bindings(installed(), published(64), dtype, frozenset([name]))))


@pytest.fixture(scope="module")
def attend(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_one(named("DynamicMaskAttend"), 87, cache=tmp_path_factory.mktemp("cache"))


def test_one_kernel_of_each_kind_of_product(attend: Compiled, tmp_path: Path) -> None:
    assert not problems(named("DynamicMaskAttend"), 87, attend, machine_code(attend))
    work = [(named("DynamicMaskAttend"), 90), (named("DynamicMaskAttend"), 100), (named("CDMoEExperts"), 87)]
    assert not check(work, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_kernel_for_every_device(dtype: str, arch: int) -> None:
    every = [(binding, arch) for size in (64, 128) for binding in bindings(installed(), published(size), dtype)]
    assert not check([(binding, arch) for binding, arch in every if is_supported(binding, arch)])


def test_registers_that_spill_are_found(tmp_path: Path) -> None:
    kernel = named("DynamicMaskAttend")

    def starved(*_: object) -> Tile:
        return replace(kernel.tile(87), max_registers=32)

    spec = replace(kernel.spec, tiler=starved)
    spilling = replace(kernel, spec=spec)
    found = check([(spilling, 87)], tmp_path)
    assert "accesses of local memory" in found["DynamicMaskAttend float16 sm_87"][0]


def test_products_on_cores_for_single_numbers_are_found(tmp_path: Path) -> None:
    compiled = compile_one(named("DynamicMaskAttend", "float32"), 87, cache=tmp_path)
    found = problems(named("DynamicMaskAttend"), 87, compiled, machine_code(compiled))
    assert found == ["multiplies with {}"]


def test_the_reader() -> None:
    usage = "Function f:\n REG:40 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:400"
    opcodes = [
        "LDG.E.128",
        "LDG.E.U8",
        "LDGSTS.E.BYPASS.128",
        "LDG.E",
        "LD.E.64",
        "LDL",
        "STL.64",
        "HGMMA.64x64x16.F32",
    ]
    code = read(opcodes, usage)
    assert code == MachineCode(8, {"HGMMA": 1}, 2, {8: 1, 32: 1, 64: 1, 128: 2}, 40, 8, 16)
    assert code.widest_load == 128 and read(["EXIT"], usage).widest_load == 0
    with pytest.raises(CompileError, match="nvdisasm names no instruction"):
        read([], usage)
    with pytest.raises(CompileError, match="cuobjdump does not say REG: nothing"):
        read(["EXIT"], "nothing\n")


def test_a_tool_that_fails_or_says_something_else_is_one_line(
    attend: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompileError, match="ptxas: ") as caught:
        machine_code(replace(attend, ptx="nothing"))
    assert "\n" not in str(caught.value)
    with pytest.raises(CompileError, match="names no instruction of the kernel"):
        machine_code(replace(attend, record=replace(attend.record, entry="other")))
    real = subprocess.run
    monkeypatch.setattr(
        module.subprocess, "run", lambda command, **more: real([shutil.which("true"), *command[1:]], **more)
    )
    with pytest.raises(CompileError, match="nvdisasm says something that is not understood"):
        machine_code(attend)


def test_the_command_shows_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command(["plugins", "compile", "--arch", "sm_87", "--kernel", "CDMoEExperts", "--machine-code"]) == 0
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[-5:] == ["matrix", "products", "widest", "load", "local"] and row.split()[-3:] == [
        "-",
        "128",
        "0",
    ]

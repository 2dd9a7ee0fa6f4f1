"""What a compiled kernel is on the device: its machine code, read without one.

ptxas makes it of the PTX as a driver would, and nvdisasm and cuobjdump, which come with Triton, read it.
References: CUDA Binary Utilities, "Instruction Set Reference" (names of instructions by architecture).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from doge_deploy.kernels.compile import Compiled, CompileError

TENSOR_CORE = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "QMMA", "OMMA")
"""Instructions that multiply matrices: a warp's (HMMA), a warp group's of 9.0 (HGMMA), those of 10.x (UTCHMMA)."""

_LOCAL = ("LDL", "STL")
_GLOBAL_LOADS = ("LDG", "LDGSTS", "LD")
"""From global memory into registers, from there into shared memory, and of an address whose kind is not known."""


@dataclass(frozen=True)
class MachineCode:
    """Counts of instructions in the code, not of their executions."""

    instructions: int
    matrix_products: Mapping[str, int]
    """Of `TENSOR_CORE`, by name."""
    local_accesses: int
    """Loads and stores of local memory, which is a thread's own part of the device's memory: spilled registers, and
    arrays that are indexed."""
    global_loads: Mapping[int, int]
    """By their size in bits."""
    registers: int
    """Per thread."""
    stack_bytes: int
    local_bytes: int

    @property
    def widest_load(self) -> int:
        """Bits of the widest load from global memory; 0 where there is none."""
        return max(self.global_loads, default=0)


def machine_code(compiled: Compiled) -> MachineCode:
    """Assemble a kernel's PTX for its device, and read what comes out.

    Raises:
        CompileError: a tool refuses it, or says something that is not understood.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    arch = compiled.record.arch
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(compiled.ptx, encoding="utf-8")
        _run(get_ptxas(arch).path, f"--gpu-name={sm_arch_from_capability(arch)}", source, "-o", cubin)
        text = _run(knobs.nvidia.nvdisasm.path, "-c", "-json", cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    return read(_opcodes(text, compiled.record.entry), usage)


def read(opcodes: Iterable[str], usage: str) -> MachineCode:
    """Counts of what the tools say.

    Args:
        opcodes: of the kernel's instructions, `LDG.E.128` and the like.
        usage: what cuobjdump says of one function's resources.

    Raises:
        CompileError: it does not say them.
    """
    parts = [opcode.split(".") for opcode in opcodes]
    if not parts:
        raise CompileError("nvdisasm names no instruction of the kernel")
    names = Counter(part[0] for part in parts)
    loads = Counter(_bits(part[1:]) for part in parts if part[0] in _GLOBAL_LOADS)

    def number(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        if found is None:
            raise CompileError(f"cuobjdump does not say {name}: {' '.join(usage.split())}")
        return int(found[1])

    return MachineCode(
        instructions=len(parts),
        matrix_products={name: names[name] for name in TENSOR_CORE if names[name]},
        local_accesses=sum(names[name] for name in _LOCAL),
        global_loads=dict(sorted(loads.items())),
        registers=number("REG"),
        stack_bytes=number("STACK"),
        local_bytes=number("LOCAL"),
    )


def _bits(modifiers: list[str]) -> int:
    """The size of a load: 32 bits where its name gives none."""
    for modifier in modifiers:
        if found := re.fullmatch(r"[US]?(8|16|32|64|128|256)", modifier):
            return int(found[1])
    return 32


def _opcodes(text: str, entry: str) -> list[str]:
    """The kernel's instructions in nvdisasm's JSON: a list of facts about the file, and a list of functions."""
    try:
        _, functions = json.loads(text)
        return [
            instruction["opcode"]
            for function in functions
            if function["function-name"] == entry
            for instruction in function["sass-instructions"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CompileError(f"nvdisasm says something that is not understood: {type(error).__name__}: {error}") from None


def _run(*command: str | Path) -> str:
    """What a tool prints; its warnings, which go elsewhere, are left out."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError(f"{Path(command[0]).name}: {' '.join((result.stdout + result.stderr).split())}")
    return result.stdout

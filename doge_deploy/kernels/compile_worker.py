"""The process that compiles: a request for each kernel, answered with PTX and figures.

A process of its own, because Triton decides at import whether kernels are compiled or interpreted, and because a
compiler that crashes must not take the caller along. Only `compile.py` starts it.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from doge_deploy.errors import DogeDeployError
from doge_deploy.kernels.parameters import check_parameters, parameter_of_tensor
from doge_deploy.process.worker import serve

_PARAMETER = re.compile(r"^\t\.param .*?(\w+_param_(\d+)),?$", re.MULTILINE)


def strip_unused_parameters(ptx: str, used: int) -> str:
    """Remove the parameters after the first `used` from the kernel's entry.

    Triton appends two pointers to scratch memory for its own launcher. Another launcher passes the kernel's arguments
    and nothing else, and the driver would read past the end of its list.

    Raises:
        ValueError: a parameter that is to go is used.
    """
    parameters = list(_PARAMETER.finditer(ptx))
    for match in reversed(parameters[used:]):
        name = match.group(1)
        if len(re.findall(rf"\b{name}\b", ptx)) != 1:
            raise ValueError(f"the kernel uses {name}, which no launcher passes")
        ptx = ptx[: match.start()] + ptx[match.end() + 1 :]
    last = list(_PARAMETER.finditer(ptx))[-1]
    return ptx[: last.start()] + last.group(0).rstrip(",") + ptx[last.end() :]


def assemble(ptx: str, ptxas: str, arch_name: str) -> dict[str, int]:
    """What ptxas says of a kernel: registers and spilled bytes.

    Raises:
        RuntimeError: ptxas refuses it.
    """
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch_name}", str(source), "-o", str(source.with_suffix(".cubin"))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ptxas: {' '.join(result.stderr.split())}")
    report = result.stdout + result.stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        if found is None:
            raise RuntimeError(f"ptxas does not say {pattern!r}: {report}")
        return int(found.group(1))

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_store_bytes": number(r"(\d+) bytes spill stores"),
        "spill_load_bytes": number(r"(\d+) bytes spill loads"),
    }


def compile_one(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel: PTX and figures, see `compile.py` for the request."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource

    module, _, name = request["kernel"].partition(":")
    function = getattr(importlib.import_module(module), name)
    types = {parameter_of_tensor(name) if type_[0] == "*" else name: type_ for name, type_ in request["arguments"]}
    check_parameters(request["plugin"], function.arg_names, list(types), request["constants"])
    signature = types | dict.fromkeys(request["constants"], "constexpr")
    # whoever launches allocates tensors at multiples of 16 bytes at least
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, type_ in enumerate(request["signature"]) if type_[0] == "*"
    }
    source = ASTSource(function, signature, {(n,): v for n, v in _by_index(function, request["constants"])}, aligned)
    arch = request["arch"]
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": request["num_warps"],
            "num_stages": request["num_stages"],
            "maxnreg": request["max_registers"],
            "ptx_version": request["ptx_version"],
            "enable_fp_fusion": True,
        },
    )
    ptx = strip_unused_parameters(compiled.asm["ptx"], len(request["signature"]))
    figures = assemble(ptx, get_ptxas(arch).path, sm_arch_from_capability(arch))
    return {
        "ptx": ptx,
        "entry": compiled.metadata.name,
        "shared_memory_bytes": compiled.metadata.shared,
        "scratch_bytes": compiled.metadata.global_scratch_size,
        "threads": 32 * compiled.metadata.num_warps,
        **figures,
    }


def _by_index(function: Any, constants: dict[str, Any]) -> list[tuple[int, Any]]:
    return [(function.arg_names.index(name), value) for name, value in constants.items()]


def _root(error: BaseException) -> str:
    """The first of a chain of errors in one line: Triton wraps one for every function on the way."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The compiled kernel, or the reason why there is none."""
    try:
        return compile_one(request)
    except DogeDeployError:
        raise
    except Exception as error:  # whatever the compiler raises
        return {"refusal": _root(error)}


if __name__ == "__main__":
    serve(answer)

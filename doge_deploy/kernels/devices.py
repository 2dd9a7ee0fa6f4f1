"""What compute capabilities mean for kernels.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (shared memory per block); PTX
ISA, release notes (first version that knows a target).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from doge_deploy.errors import UsageError


@dataclass(frozen=True)
class Device:
    """One compute capability."""

    shared_memory_bytes: int
    """Per block, where a launcher asks for more than the 48 KiB that need no asking."""
    ptx_version: int
    """The PTX version that is written, 86 for 8.6: the lowest that knows the target, or 8.0, so that an older driver
    still reads it."""
    bfloat16: bool = True
    """Has bfloat16 arithmetic."""
    examples: str = ""


_KIB = 1024

DEVICES: Mapping[int, Device] = {
    75: Device(64 * _KIB, 80, bfloat16=False, examples="T4, RTX 20"),
    80: Device(163 * _KIB, 80, examples="A100"),
    86: Device(99 * _KIB, 80, examples="RTX 30, A10"),
    87: Device(163 * _KIB, 80, examples="Jetson Orin"),
    89: Device(99 * _KIB, 80, examples="RTX 40, L4"),
    90: Device(227 * _KIB, 80, examples="H100"),
    100: Device(227 * _KIB, 86, examples="B200"),
    110: Device(227 * _KIB, 90, examples="Jetson Thor"),
    120: Device(99 * _KIB, 87, examples="RTX 50"),
    121: Device(99 * _KIB, 88, examples="DGX Spark"),
}
"""Every compute capability that kernels are compiled for; 87 stands for 8.7."""


def parse_arch(text: str) -> int:
    """`sm_87`, `sm87`, `87` or `8.7` -> 87.

    Raises:
        UsageError: not one of `DEVICES`.
    """
    digits = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)a?", text.strip().lower())
    arch = int("".join(digits.groups())) if digits else -1
    if arch not in DEVICES:
        legal = ", ".join(f"sm_{known}" for known in DEVICES)
        raise UsageError(f"arch={text!r}: must be one of {legal}")
    return arch

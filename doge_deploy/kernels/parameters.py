"""A kernel's own parameters compared with those of its spec.

Arguments are passed by position, so that two of one type in another order would compile, run, and compute nonsense. A
tensor `x` of a spec is the parameter `x_ptr` of its kernel; scalars and constants have the spec's names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from doge_deploy.errors import UnsupportedModelError


def parameter_of_tensor(name: str) -> str:
    """Name of the parameter that is the pointer to a tensor."""
    return f"{name}_ptr"


def check_parameters(plugin: str, found: Sequence[str], arguments: Sequence[str], constants: Collection[str]) -> None:
    """Check names and order.

    Args:
        plugin: the spec's id, for messages.
        found: names of the kernel's parameters.
        arguments: those of the spec in order: inputs, scalars, outputs.
        constants: compile-time constants of the spec and its tile, which follow in any order.

    Raises:
        UnsupportedModelError: the first parameter that is another one, or a constant that one of both does not have.
    """
    for index, expected in enumerate(arguments):
        if index >= len(found) or found[index] != expected:
            name = repr(found[index]) if index < len(found) else "missing"
            raise UnsupportedModelError(
                f"{plugin}: parameter {index + 1} of its kernel is {name}, must be {expected!r}: its spec has "
                f"{', '.join(arguments)} in this order"
            )
    rest = found[len(arguments) :]
    unknown = [name for name in rest if name not in constants]
    missing = [name for name in constants if name not in rest]
    if unknown or missing:
        both = [f"{name!r} is not in its spec" for name in unknown]
        both += [f"the spec's {name!r} is not in the kernel" for name in missing]
        raise UnsupportedModelError(f"{plugin}: constants of its kernel: {'; '.join(both)}")

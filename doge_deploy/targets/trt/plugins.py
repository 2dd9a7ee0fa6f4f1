"""The door for plugins: entry points of the group `doge_deploy.plugins`.

An entry point is named after the `doge` operator that it implements and loads an object with the members of
`PluginLowering`. Ours and anybody else's come through the same door. Loading one must import neither Triton nor
TensorRT; `register` may.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from doge_deploy.errors import MissingDependencyError, UnsupportedModelError

if TYPE_CHECKING:
    import onnx_ir as ir

GROUP = "doge_deploy.plugins"


class PluginLowering(Protocol):
    """How one `doge` operator becomes plugin nodes."""

    operator: str
    """`DynamicMaskAttention` or `CDMoE`."""
    namespace: str
    """Of the plugin nodes, which carry it as `plugin_namespace`."""
    version: str
    """Of the plugins, which carry it as `plugin_version`."""
    plugin_names: Collection[str]
    """Op types of the nodes that `lower` writes: the plugins' names."""

    def lower(self, model: ir.Model) -> ir.Model:
        """Replace every node of the operator by plugin nodes without bodies.

        Raises:
            UnsupportedModelError: the plugins cannot do what the model needs.
        """

    def register(self) -> None:
        """Make the plugins known to TensorRT in this process.

        Raises:
            MissingDependencyError: something that they need is not installed.
        """


def find_plugins() -> dict[str, PluginLowering]:
    """Every installed plugin lowering by operator.

    Raises:
        UnsupportedModelError: two packages bring one for the same operator, or one does not load.
    """
    found: dict[str, PluginLowering] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name in found:
            raise UnsupportedModelError(f"two packages bring a plugin for {entry.name}: {entry.value} is the second")
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # code of another package
            raise UnsupportedModelError(
                f"the plugin {entry.name} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    return found


def plugins_for(operators: Collection[str]) -> list[PluginLowering]:
    """Lowerings for the `doge` operators of a graph.

    Raises:
        MissingDependencyError: one of them has no plugin here.
    """
    found = find_plugins()
    missing = sorted(set(operators) - set(found))
    if missing:
        held = ", ".join(sorted(found)) or "none"
        raise MissingDependencyError(
            f"no plugin for {', '.join(missing)} is installed (entry points {GROUP!r}: {held}); install one, or build "
            "with --no-plugins, which uses native layers only"
        )
    return [found[operator] for operator in sorted(set(operators))]

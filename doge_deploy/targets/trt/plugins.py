"""The plugin lowering of one operator, as a build takes it.

Plugins come in by entry point, ours and anybody else's: see `doge_deploy.kernels.registry`. Finding one imports neither
Triton nor TensorRT; `register` does both.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from doge_deploy.errors import MissingDependencyError
from doge_deploy.kernels.registry import GROUP, Registry, installed, make_registry
from doge_deploy.kernels.spec import OperatorPlugin

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "doge"


class PluginLowering(Protocol):
    """How one `doge` operator becomes plugin nodes."""

    @property
    def operator(self) -> str:
        """`DynamicMaskAttention` or `CDMoE`."""

    @property
    def namespace(self) -> str:
        """Of the plugin nodes, which carry it as `plugin_namespace`."""

    @property
    def version(self) -> str:
        """Of the plugins, which carry it as `plugin_version`."""

    @property
    def plugin_names(self) -> Collection[str]:
        """Op types of the nodes that `lower` writes: the plugins' names."""

    def lower(self, model: ir.Model) -> ir.Model:
        """Replace every node of the operator by plugin nodes without bodies.

        Raises:
            UnsupportedModelError: the plugins cannot do what the model needs.
        """

    def register(self, capabilities: Collection[str]) -> None:
        """Make the plugins known to TensorRT in this process, for devices of these compute capabilities.

        Raises:
            MissingDependencyError: something that they need is not installed.
        """


@dataclass(frozen=True)
class ChainLowering:
    """An operator as the chain of nodes that its plugin names."""

    plugin: OperatorPlugin

    @property
    def operator(self) -> str:
        return self.plugin.operator

    @property
    def namespace(self) -> str:
        return self.plugin.specs[0].namespace

    @property
    def version(self) -> str:
        return self.plugin.specs[0].version

    @property
    def plugin_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.plugin.specs)

    def lower(self, model: ir.Model) -> ir.Model:
        from doge_deploy.graph.passes.plugin_chains import PluginChainPass

        registry = make_registry([(self.plugin, "this build")])
        return PluginChainPass(registry)(model).model

    def register(self, capabilities: Collection[str]) -> None:
        from doge_deploy.kernels.tensorrt import register

        # PTX for a capability runs on every later one too
        register(self.plugin.specs, min(int(text.replace(".", "")) for text in capabilities))


def plugins_for(operators: Collection[str], registry: Registry | None = None) -> list[PluginLowering]:
    """Lowerings for the `doge` operators of a graph.

    Args:
        operators: their names.
        registry: the plugins; those that are installed where None.

    Raises:
        MissingDependencyError: one of them has no plugin here.
        UsageError: two packages bring a plugin for the same operator.
    """
    registry = installed() if registry is None else registry
    found = {name: registry.operator(DOMAIN, name) for name in sorted(set(operators))}
    missing = [name for name, plugin in found.items() if plugin is None]
    if missing:
        held = ", ".join(name for _, name in registry.operators) or "none"
        raise MissingDependencyError(
            f"no plugin for {', '.join(missing)} is installed (entry points {GROUP!r}: {held}); install one, or build "
            "with --no-plugins, which uses native layers only"
        )
    return [ChainLowering(plugin) for plugin in found.values() if plugin is not None]

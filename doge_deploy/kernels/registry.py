"""Plugins that are installed: every package brings its own through the entry point group `doge_deploy.plugins`.

An entry point names an `OperatorPlugin`. Finding one imports its spec, which imports neither Triton nor TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points

from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.kernels.spec import OperatorPlugin, PluginSpec

GROUP = "doge_deploy.plugins"


@dataclass(frozen=True)
class Registry:
    """Operators that have a chain of kernels, and those kernels."""

    operators: Mapping[tuple[str, str], OperatorPlugin] = field(default_factory=dict)
    """By domain and name of the operator: `("doge", "CDMoE")`."""
    origins: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Package and version that brings the operator: `doge-deploy 0.1.0`."""

    def operator(self, domain: str, name: str) -> OperatorPlugin | None:
        """The chain of an operator, or None where nobody brings one."""
        return self.operators.get((domain, name))

    def specs(self) -> Iterator[PluginSpec]:
        """Every kernel of every operator."""
        for operator in self.operators.values():
            yield from operator.specs

    def spec(self, plugin_id: str) -> PluginSpec | None:
        """The kernel `doge::DynamicMaskSelect`, or None."""
        return next((spec for spec in self.specs() if spec.id == plugin_id), None)


def make_registry(plugins: Iterable[tuple[OperatorPlugin, str]]) -> Registry:
    """A registry of plugins, each with the name of what brings it.

    Raises:
        UsageError: two bring the same operator or the same kernel, so that it is not clear which one is meant.
    """
    operators: dict[tuple[str, str], OperatorPlugin] = {}
    origins: dict[tuple[str, str], str] = {}
    kernels: dict[str, str] = {}
    for plugin, origin in plugins:
        key = (plugin.domain, plugin.operator)
        if key in operators:
            raise UsageError(
                f"{plugin.domain}::{plugin.operator} has two plugins, from {origins[key]} and from {origin}; "
                f"uninstall one of them"
            )
        for spec in plugin.specs:
            if spec.id in kernels:
                raise UsageError(f"plugin {spec.id} is brought twice, by {kernels[spec.id]} and by {origin}")
            kernels[spec.id] = origin
        operators[key], origins[key] = plugin, origin
    return Registry(operators, origins)


def installed() -> Registry:
    """All plugins of this environment.

    Raises:
        MissingDependencyError: an entry point cannot be loaded, or does not name an `OperatorPlugin`.
        UsageError: two packages bring the same operator.
    """
    return make_registry((_load(entry), _origin(entry)) for entry in sorted(entry_points(group=GROUP)))


def _load(entry: EntryPoint) -> OperatorPlugin:
    try:
        plugin = entry.load()
    except Exception as error:  # whatever someone else's package raises while it is imported
        raise MissingDependencyError(
            f"plugin {entry.name!r} of {_origin(entry)} cannot be loaded from {entry.value}: {error}"
        ) from error
    if not isinstance(plugin, OperatorPlugin):
        raise MissingDependencyError(
            f"plugin {entry.name!r} of {_origin(entry)}: {entry.value} is {type(plugin).__name__}, must be an "
            f"OperatorPlugin"
        )
    return plugin


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value

"""A bundle's layout as the vendor's parser gets it, and what an engine's record says of that graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from doge_deploy.bundle.engine_record import PluginUse
from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.preflight import require_plugins
from doge_deploy.kernels.registry import installed
from doge_deploy.targets.trt.bounded.lowering import BoundedAttentionPass
from doge_deploy.targets.trt.low_bits import low_bit_numbers
from doge_deploy.targets.trt.lowering import lower
from doge_deploy.targets.trt.plugins import PluginLowering, plugins_for


@dataclass(frozen=True)
class LoweredLayout:
    """A graph for the vendor's parser and the plugins in it."""

    model: ir.Model
    plugins: tuple[PluginLowering, ...] = ()

    def serialized(self) -> bytes:
        """The graph as an ONNX file; weights stay where they are."""
        data: bytes = ir.to_proto(self.model).SerializeToString()
        return data

    def aliases(self) -> dict[str, str]:
        """Present outputs that TensorScatter writes, with the past inputs whose buffers they are."""
        inputs = {value.name for value in self.model.graph.inputs}
        aliases = {}
        for value in self.model.graph.outputs:
            node = value.producer()
            if node is not None and node.op_type == "TensorScatter" and node.inputs[0] is not None:
                past = node.inputs[0].name
                if past in inputs and value.name is not None and past is not None:
                    aliases[value.name] = past
        return aliases

    def low_bit_numbers(self) -> int:
        """Numbers of few bits that the graph multiplies with or looks up."""
        return low_bit_numbers(self.model)

    def weight_bytes(self) -> int:
        """Bytes of the weights that the graph refers to, each once."""
        values = self.model.graph.initializers.values()
        return sum(value.const_value.nbytes for value in values if value.const_value is not None)

    def weight_file(self) -> str:
        """The file that holds the external data, relative to the bundle.

        Raises:
            UnsupportedModelError: there is none.
        """
        for value in self.model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                return str(value.const_value.location)
        raise UnsupportedModelError("the graph has no external weights")

    def plugin_uses(self) -> tuple[PluginUse, ...]:
        """Every plugin with the number of its nodes."""
        counts = Counter(node.op_type for node in self.model.graph)
        return tuple(
            PluginUse(name=name, version=plugin.version, namespace=plugin.namespace, layers=counts[name])
            for plugin in self.plugins
            for name in sorted(plugin.plugin_names)
            if counts[name]
        )


def lower_layout(
    bundle: Bundle, layout: Layout, *, use_plugins: bool, bounded: BoundedAttentionPass | None = None
) -> LoweredLayout:
    """The graph that the vendor's parser gets, and the plugins in it.

    Args:
        bundle: where the graph lies.
        layout: a static layout of it.
        use_plugins: lower `doge` operators to the installed plugins, not to native layers.
        bounded: gives the graph a cache of the window; only without plugins.

    Raises:
        UnsupportedModelError: the graph has what the product cannot do, or a node does not fit its plugin.
        MissingDependencyError: a plugin is missing.
    """
    model = ir.load(bundle.path / layout.file)
    if not use_plugins:
        return LoweredLayout(lower(model, bounded=bounded))
    registry = installed()
    plugins = plugins_for({node.op_type for node in model.graph if node.domain == "doge"}, registry)
    lowered = lower(model, plugins)
    require_plugins(lowered, registry)
    return LoweredLayout(lowered, tuple(plugins))

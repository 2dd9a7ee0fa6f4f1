"""What `doge-deploy inspect` shows of an engine: its record, and what the builder said about its layers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from doge_deploy.bundle.engine_record import EngineRecord, Network
    from doge_deploy.bundle.opening import Bundle


def find_engine(path: Path) -> tuple[Path, str] | None:
    """The bundle and the engine's name where `path` is an engine's folder or a file in one, else None."""
    from doge_deploy.bundle.engine_record import ENGINES
    from doge_deploy.bundle.files import MANIFEST

    folder = path.resolve()
    folder = folder.parent if folder.is_file() else folder
    if folder.parent.name == ENGINES and (folder.parent.parent / MANIFEST).is_file():
        return folder.parent.parent, folder.name
    return None


def show_engine(bundle: Bundle, name: str, *, as_json: bool, layers: bool) -> None:
    """Print the engine's record and report."""
    from rich.console import Console

    record = bundle.engine(name)
    reports: list[dict[str, Any]] = [
        json.loads((bundle.path / network.report_file).read_text(encoding="utf-8")) for network in record.networks
    ]
    console = Console()
    if as_json:
        data = {"record": record.model_dump(mode="json"), "report": reports[0]}
        if record.prefill is not None:
            data["prefill_report"] = reports[1]
        console.print(json.dumps(data, indent=2), highlight=False, soft_wrap=True, markup=False)
        return
    console.print(_grid(_facts(record)), highlight=False)
    for network, report in zip(record.networks, reports, strict=True):
        console.print(_grid(_network_facts(network)), highlight=False)
        console.print(_profiles(network), highlight=False)
        console.print(_counts(network, report), highlight=False)
        if layers:
            console.print(_kernels(report) if report["kernels"] else _network(report), highlight=False)


def _facts(record: EngineRecord) -> dict[str, str]:
    """What is true of the whole engine."""
    caps = ", ".join(record.compute_capabilities) or f"every GPU that {record.product}'s default covers"
    facts = {
        "engine": record.directory,
        "built by": f"{record.product} {record.version} on {record.platform}",
        "for": f"compute capability {caps}",
        "from": f"{record.onnx.file} (sha256 {record.onnx.sha256[:12]}...), {record.weights.file} "
        f"({record.weights.sha256[:12]}...)",
        "lowering": f"{record.lowering}, strongly typed {record.dtype}, scores fp32",
        "flags": ", ".join(record.flags) or "none",
    }
    if record.strip_weights:
        facts["weights"] = "stripped"
    if record.window is not None:
        facts["cache"] = f"{record.window} slots, its keep_window_size; one network decodes, one takes longer calls"
    for plugin in record.plugins:
        facts[f"plugin {plugin.name}"] = f"version {plugin.version}, {plugin.layers} layers"
    return facts


def _network_facts(network: Network) -> dict[str, str]:
    """What is true of one of its networks."""
    size = f"{network.engine_bytes / 1e6:.1f} MB, {network.engine_bytes / network.weight_bytes:.2f} times its weights"
    facts = {
        "file": network.engine_file,
        "built in": f"{network.build_seconds:.1f} s, peak memory {network.peak_memory_bytes / 1e6:.0f} MB",
        "size": size,
        "scratch": _bytes(network.activation_bytes) + " beside weights and caches",
        "cache": f"{network.layers.kv_cache_update} layers write it in place "
        f"({len(network.aliases)} outputs share the buffer of an input)",
        "attention": f"{network.layers.attention} native layers" + _fused(network),
    }
    if network.kernels is not None and network.kernels.low_bit:
        facts["weights"] = f"of few bits, read as they are stored by {network.kernels.low_bit} kernels"
    for reason in sorted({layer.reason for layer in network.layers.decomposed}):
        named = [layer.layer for layer in network.layers.decomposed if layer.reason == reason]
        facts["decomposed"] = f"{len(named)} attention layers ({named[0]} to {named[-1]}): {reason}"
    return facts


def _fused(network: Network) -> str:
    if network.kernels is None:
        return ""
    each = network.layers.attention * len(network.profiles)
    return f"; {network.kernels.fused_attention} of {each} (one per layer and profile) run as one kernel"


def _bytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.1f} MB"


def _grid(rows: dict[str, str]) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        grid.add_row(f"[bold]{key}[/bold]", value)
    return grid


def _profiles(network: Network) -> Table:
    from rich.table import Table

    table = Table("profile", "axis", "min", "opt", "max")
    for profile in network.profiles:
        for index, (axis, sizes) in enumerate(profile.axes.items()):
            name = "" if index else profile.name
            table.add_row(name, axis, str(sizes.min), str(sizes.opt), str(sizes.max))
    return table


def _counts(network: Network, report: dict[str, Any]) -> Table:
    """Layers of the network by type and precision, beside the kernels that the builder made of them."""
    from rich.table import Table

    table = Table("layers of the network", "", "kernels in the engine", "", title_justify="left")
    precisions = Counter(layer["outputs"][0]["dtype"] for layer in report["network"] if layer["outputs"])
    left = [*network.layers.by_type.items(), ("", ""), *precisions.most_common()]
    kernels = network.kernels
    right: list[tuple[str, Any]] = [("the builder did not say", "")]
    if kernels is not None:
        right = [*kernels.by_type.items(), ("", ""), *kernels.by_precision.items()]
    for index in range(max(len(left), len(right))):
        a = left[index] if index < len(left) else ("", "")
        b = right[index] if index < len(right) else ("", "")
        table.add_row(a[0], str(a[1]), b[0], str(b[1]))
    return table


def _kernels(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("kernel", "type", "precision", "computes")
    for kernel in report["kernels"]:
        precision = kernel["outputs"][0]["dtype"] if kernel["outputs"] else ""
        table.add_row(kernel["name"], kernel["type"], precision, ", ".join(kernel["onnx_layers"]))
    return table


def _network(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("layer", "type", "precision")
    for layer in report["network"]:
        table.add_row(layer["name"], layer["type"], layer["outputs"][0]["dtype"] if layer["outputs"] else "")
    return table

"""What `doctor` shows to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from doge_deploy.devices.facts import DeviceFacts
from doge_deploy.doctor.deployment_options import Way, Wish, size

if TYPE_CHECKING:
    from doge_deploy.doctor.machine import Machine
    from doge_deploy.doctor.model import Subject
    from doge_deploy.doctor.targets import Target


def show(
    machine: Machine | None,
    rows: list[Target],
    subject: Subject | None,
    answers: list[tuple[str, DeviceFacts, Wish, list[Way]]],
) -> None:
    """Print everything to standard output."""
    console = Console()
    if machine is not None:
        console.print(_machine(machine), highlight=False)
        console.print()
        console.print(_targets(rows), highlight=False)
    for index, (name, facts, wish, ways) in enumerate(answers):
        if machine is not None or index:
            console.print()
        console.print(f"[bold]{escape(name)}[/bold]: {escape(_facts(facts))}", highlight=False)
        if subject is not None:
            console.print(escape(_question(subject, wish)), highlight=False)
        console.print(_ways(ways), highlight=False)


def _machine(machine: Machine) -> Table:
    lines = {
        "system": f"{machine.system}, Python {machine.python}",
        "board": machine.board,
        "processor": f"{machine.processor}, {machine.cpus} CPUs",
        "memory": _memory(machine.memory_bytes, machine.free_bytes),
        "driver": f"{machine.driver}, CUDA {machine.cuda or 'unknown'}" if machine.driver else "no NVIDIA driver",
    }
    grid = Table.grid(padding=(0, 2))
    for key, value in lines.items():
        if value:
            grid.add_row(f"[bold]{key}[/bold]", escape(value))
    for gpu in machine.gpus:
        capability = f"compute capability {gpu.compute_capability or 'unknown'}"
        grid.add_row(
            "[bold]GPU[/bold]", escape(f"{gpu.name}, {capability}, {_memory(gpu.memory_bytes, gpu.free_bytes)}")
        )
    for name, found in machine.libraries.items():
        if found.version is None:
            continue
        providers = ", ".join(found.details.get("providers", ()))
        problem = f" [red]{escape(found.problem)}[/red]" if found.problem else ""
        grid.add_row(name, escape(found.version + (f", {providers}" if providers else "")) + problem)
    return grid


def _memory(total: int | None, free: int | None) -> str:
    if total is None:
        return "memory unknown"
    return size(total) + (f", {size(free)} free" if free is not None else "")


def _targets(rows: list[Target]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(_mark(row.usable), row.name, _with_remedy(row.reason, row.remedy))
    return grid


def _question(subject: Subject, wish: Wish) -> str:
    rows = f"{wish.batch_size} row{'s' if wish.batch_size > 1 else ''} of {subject.max_length} tokens"
    return f"{subject.name}{f' ({subject.dtype})' if subject.dtype else ''}, {rows}"


def _ways(ways: list[Way]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for way in ways:
        answer = [_with_remedy(way.reason, way.remedy)] if way.reason else []
        if way.needs is not None and way.usable:
            parts = (way.needs.weight_bytes, way.needs.cache_bytes, way.needs.activation_bytes)
            weights, cache, activations = map(size, parts)
            answer.append(
                f"{size(way.needs.total_bytes)}: weights {weights}, cache {cache}, activations at most {activations}"
            )
        if way.tokens_per_second is not None and way.usable:
            answer.append(f"memory allows at most {way.tokens_per_second:,.0f} tokens/s".replace(",", " "))
        grid.add_row(_mark(way.usable), way.backend, way.lowering, way.dtype, "\n".join(answer))
    return grid


def _facts(facts: DeviceFacts) -> str:
    parts = [facts.product]
    if facts.compute_capability:
        parts.append(f"compute capability {facts.compute_capability}")
    if facts.usable_bytes is not None and facts.memory_gib is not None:
        shared = "shared " if facts.memory_shared else ""
        parts.append(f"{facts.memory_gib:.0f} GiB {shared}memory, {size(facts.usable_bytes)} of it for a model")
    if facts.bandwidth_gb_per_s:
        parts.append(f"{facts.bandwidth_gb_per_s:g} GB/s")
    versions = {"JetPack": facts.jetpack, "TensorRT": facts.tensorrt, "TensorRT-RTX": facts.tensorrt_rtx}
    parts += [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join(parts)


def _with_remedy(reason: str, remedy: str) -> str:
    return escape(reason) + (f"\n[bold]remedy:[/bold] {escape(remedy)}" if remedy else "")


def _mark(usable: bool) -> str:
    return "[green]yes[/green]" if usable else "[red]no[/red]"

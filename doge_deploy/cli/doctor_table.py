"""What `doctor` shows to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from doge_deploy.devices.facts import DeviceFacts
from doge_deploy.doctor.deployment_options import DeploymentOption, size

if TYPE_CHECKING:
    from doge_deploy.doctor.commands import CommandStatus
    from doge_deploy.doctor.machine import Machine
    from doge_deploy.targets.deployment import Constraints, DeployableModel


def show(
    machine: Machine | None,
    rows: list[CommandStatus],
    model: DeployableModel | None,
    answers: list[tuple[str, DeviceFacts, Constraints, list[DeploymentOption]]],
) -> None:
    """Print everything to standard output."""
    console = Console()
    if machine is not None:
        console.print(_machine(machine), highlight=False)
        console.print()
        console.print(_commands(rows), highlight=False)
    for index, (name, facts, constraints, deployment_options) in enumerate(answers):
        if machine is not None or index:
            console.print()
        console.print(f"[bold]{escape(name)}[/bold]: {escape(_facts(facts))}", highlight=False)
        if model is not None:
            console.print(escape(_question(model, constraints)), highlight=False)
        console.print(_deployment_options(deployment_options), highlight=False)


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


def _commands(rows: list[CommandStatus]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(_mark(row.usable), row.name, _with_remedy(row.reason, row.remedy))
    return grid


def _question(model: DeployableModel, constraints: Constraints) -> str:
    rows = f"{constraints.batch_size} row{'s' if constraints.batch_size > 1 else ''} of {model.max_length} tokens"
    return f"{model.name}{f' ({model.dtype})' if model.dtype else ''}, {rows}"


def _deployment_options(deployment_options: list[DeploymentOption]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for option in deployment_options:
        answer = [_with_remedy(option.reason, option.remedy)] if option.reason else []
        if option.needs is not None and option.usable:
            parts = (option.needs.weight_bytes, option.needs.cache_bytes, option.needs.activation_bytes)
            weights, cache, activations = map(size, parts)
            answer.append(
                f"{size(option.needs.total_bytes)}: weights {weights}, cache {cache}, activations at most {activations}"
            )
        if option.tokens_per_second is not None and option.usable:
            answer.append(f"memory allows at most {option.tokens_per_second:,.0f} tokens/s".replace(",", " "))
        grid.add_row(_mark(option.usable), option.backend, option.lowering, option.dtype, "\n".join(answer))
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

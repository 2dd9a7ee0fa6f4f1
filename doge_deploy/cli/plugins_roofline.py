"""`doge-deploy plugins roofline`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from doge_deploy.dtypes import NAMES

if TYPE_CHECKING:
    from doge_deploy.config.model import DogeFacts
    from doge_deploy.doctor.kernel_roofline import Roofline, RooflineDevice


@click.command("roofline")
@click.option(
    "--device", "device", required=True, metavar="NAME", help="A device of export_configs/, or a part of its name."
)
@click.option(
    "--model", "model", required=True, metavar="SIZE|MODEL", help="A published size such as 20M, or a checkpoint."
)
@click.option("--past", type=click.IntRange(min=0), required=True, metavar="N", help="Tokens that a row holds already.")
@click.option(
    "--new",
    "new",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="New tokens of the call.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Every number as JSON.")
def roofline(device: str, model: str, past: int, new: int, batch_size: int, dtype: str, as_json: bool) -> None:
    """Calculate what each kernel should cost, beside the standard operators that it replaces.

    A calculation: bytes and operations are counted, at the device's published bandwidth and peak. Nothing is measured.
    """
    from doge_deploy.devices.packages import require_graph_packages

    require_graph_packages("plugins roofline")
    from doge_deploy.doctor.kernel_roofline import Call
    from doge_deploy.doctor.kernel_roofline import roofline as make
    from doge_deploy.kernels.registry import installed

    machine, sources = _machine(device)
    call = Call(past=past, new=new, batch=batch_size, dtype=NAMES[dtype])
    result = make(_facts(model), machine, call, installed())
    if as_json:
        import json

        click.echo(json.dumps(_to_json(result, model, sources), indent=2))
        return
    _show(result, model, sources)


def _machine(name: str) -> tuple[RooflineDevice, list[str]]:
    """The device's figures, and where they come from."""
    from doge_deploy.devices.facts import device_configs
    from doge_deploy.diagnostics import suggest
    from doge_deploy.doctor.kernel_roofline import RooflineDevice
    from doge_deploy.errors import UsageError

    configs = {key: config for key, config in device_configs().items() if config.facts.fp16_tflops is not None}
    matching = [key for key in configs if key == name] or [key for key in configs if key.startswith(name)]
    if not matching:
        raise UsageError(f"--device {name}: no such device{suggest(name, configs)}; known: {', '.join(configs)}")
    chosen = configs[matching[0]]
    facts = chosen.facts
    assert facts.compute_capability is not None
    assert facts.bandwidth_gb_per_s is not None
    assert facts.fp16_tflops is not None
    arch = int(facts.compute_capability.replace(".", ""))
    sources = [source for source in chosen.sources if "bandwidth" in source or "fp16_tflops" in source]
    return RooflineDevice(facts.product, arch, facts.bandwidth_gb_per_s, facts.fp16_tflops), sources


def _facts(model: str) -> DogeFacts:
    from doge_deploy.config.published import SIZES, published_facts

    if model in SIZES:
        return published_facts(model)
    from doge_deploy.checkpoint import open_checkpoint

    return open_checkpoint(model).facts


def _show(result: Roofline, model: str, sources: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, machine, call = Console(), result.machine, result.call
    console.print(
        f"[bold]Computed, not measured.[/bold] {model}, {call.dtype}, {call.new} new token(s) on {call.past}, batch "
        f"{call.batch}; {machine.name}: {machine.bandwidth_gb_per_s:g} GB/s, {machine.fp16_tflops:g} TFLOPS",
        highlight=False,
    )
    table = Table("kernel", "loads MB", "stores MB", "bus MB", "MFLOP", "us", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in result.lines:
        cost = line.cost
        numbers = (cost.loaded_bytes / 1e6, cost.stored_bytes / 1e6, cost.memory_bytes / 1e6, cost.flops / 1e6)
        name = line.kernel if line.lowering == "plugins" else f"{line.operator}, standard"
        table.add_row(name, *(f"{number:.2f}" for number in numbers), f"{machine.microseconds(cost):.1f}")
    console.print(table)
    plugins, standard = (result.microseconds(lowering) for lowering in ("plugins", "standard"))
    rest = machine.microseconds(result.rest)
    console.print(
        f"both operators, all layers: plugins {plugins:.1f} us, standard {standard:.1f} us: "
        f"{result.operator_gain:.2f} times\n"
        f"whole step, with {rest:.1f} us for the weights: {result.step_gain:.2f} times",
        highlight=False,
    )
    for source in sources:
        console.print(f"source: {source}", highlight=False, markup=False)


def _to_json(result: Roofline, model: str, sources: list[str]) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "kind": "computed, not measured",
        "model": model,
        "device": asdict(result.machine),
        "sources": sources,
        "call": asdict(result.call),
        "lines": [{**asdict(line), "microseconds": result.machine.microseconds(line.cost)} for line in result.lines],
        "rest": asdict(result.rest),
        "plugins_us": result.microseconds("plugins"),
        "standard_us": result.microseconds("standard"),
        "rest_us": result.machine.microseconds(result.rest),
        "operator_gain": result.operator_gain,
        "step_gain": result.step_gain,
    }

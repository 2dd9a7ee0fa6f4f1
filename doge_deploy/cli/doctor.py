"""`doge-deploy doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from doge_deploy.dtypes import NAMES

if TYPE_CHECKING:
    from doge_deploy.devices.facts import DeviceFacts
    from doge_deploy.doctor.commands import CommandStatus
    from doge_deploy.doctor.deployment_options import DeploymentOption
    from doge_deploy.doctor.machine import Machine
    from doge_deploy.targets.deployment import Constraints, DeployableModel


@click.command("doctor")
@click.argument("model", metavar="[MODEL|BUNDLE]", required=False)
@click.option(
    "--target",
    "names",
    multiple=True,
    metavar="DEVICE",
    help="A device of export_configs/, some words of its name, or a YAML file; repeatable. Default: this machine.",
)
@click.option("--dtype", type=click.Choice(tuple(NAMES)), help="Dtype of a MODEL. Default: the device's own.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), metavar="N", help="Rows at a time. Default: the device's own."
)
@click.option(
    "--max-length", type=click.IntRange(min=1), metavar="N", help="Tokens per row of a MODEL. Default: its own."
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def doctor(
    model: str | None,
    names: tuple[str, ...],
    dtype: str | None,
    batch_size: int | None,
    max_length: int | None,
    as_json: bool,
) -> None:
    """Say what this machine, or another device, can do, and whether a model fits.

    Without MODEL and --target: what is installed here, and which targets can be used.

    Exit code 4: one of the devices that were named cannot run the model.
    """
    from doge_deploy.doctor.model import open_model

    described = open_model(model, max_length=max_length) if model is not None else None
    asked = {"dtype": dtype, "batch_size": batch_size}
    machine, rows = _here() if not names else (None, [])
    answers = list(_answers(names, machine, described, asked))
    if as_json:
        _print_json(machine, rows, described, answers)
    else:
        from doge_deploy.cli.doctor_table import show

        show(machine, rows, described, answers)
    _complain([name for name, _, _, found in answers if not any(option.usable for option in found)])


Answer = tuple[str, "DeviceFacts", "Constraints", "list[DeploymentOption]"]


def _here() -> tuple[Machine, list[CommandStatus]]:
    from doge_deploy.doctor.commands import commands
    from doge_deploy.doctor.machine import this_machine

    machine = this_machine()
    return machine, commands(machine)


def _answers(
    names: tuple[str, ...], machine: Machine | None, described: DeployableModel | None, asked: dict[str, Any]
) -> Iterator[Answer]:
    """Name, facts, constraints and deployment options of every device that is asked about."""
    from doge_deploy.devices.facts import device_configs, find_devices, load_device_config
    from doge_deploy.doctor.deployment_options import deployment_options
    from doge_deploy.targets.deployment import Constraints

    given = {key: value for key, value in asked.items() if value is not None}
    if machine is not None:
        if described is not None:
            facts, constraints = machine.device(), Constraints(**given)
            yield "this machine", facts, constraints, deployment_options(facts, described, constraints)
        return
    known = device_configs()
    chosen = {}
    for name in names:
        if name.endswith((".yaml", ".yml")):
            config = load_device_config(Path(name))
            chosen[config.name] = config
        else:
            chosen.update({one: known[one] for one in find_devices(name, list(known))})
    for name, config in chosen.items():
        choices: dict[str, Any] = {}
        if config.build is not None:
            build = config.build
            choices = {
                "engine_dtype": config.export.dtype,
                "plugins": build.plugins,
                "batch_size": build.batch_size.max,
            }
        constraints = Constraints(**{**choices, **given})
        yield name, config.facts, constraints, deployment_options(config.facts, described, constraints)


def _print_json(
    machine: Machine | None, rows: list[CommandStatus], described: DeployableModel | None, answers: list[Answer]
) -> None:
    import json

    document = {
        "machine": asdict(machine) if machine else None,
        "targets": [asdict(row) for row in rows],
        "model": {"name": described.name, "dtype": described.dtype, "max_length": described.max_length}
        if described
        else None,
        "devices": [
            {
                "name": name,
                "facts": facts.model_dump(),
                "batch_size": constraints.batch_size,
                "deployment_options": [{**asdict(option), "usable": option.usable} for option in found],
            }
            for name, facts, constraints, found in answers
        ],
    }
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _complain(hopeless: list[str]) -> None:
    from doge_deploy.errors import MissingDependencyError

    if hopeless:
        raise MissingDependencyError(f"no deployment option for {', '.join(hopeless)}; the table has the reasons")

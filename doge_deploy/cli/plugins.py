"""`doge-deploy plugins`: what is installed, and whether a graph fits it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from doge_deploy.cli.plugins_compile import compile_command
from doge_deploy.cli.plugins_record import record_command, verify_command
from doge_deploy.cli.plugins_roofline import roofline

if TYPE_CHECKING:
    from doge_deploy.kernels.preflight import Verdict
    from doge_deploy.kernels.registry import Registry


@click.group("plugins")
def plugins() -> None:
    """Kernels for Doge's two operators, as TensorRT plugins."""


plugins.add_command(compile_command)
plugins.add_command(record_command)
plugins.add_command(roofline)
plugins.add_command(verify_command)


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Every tensor, attribute and limit as JSON.")
def list_plugins(as_json: bool) -> None:
    """Show the plugins that are installed."""
    from doge_deploy.kernels.registry import installed

    registry = installed()
    if as_json:
        import json

        click.echo(json.dumps(_to_json(registry), indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for key, operator in registry.operators.items():
        name = f"{operator.domain}::{operator.operator}"
        console.print(f"[bold]{name}[/bold], version {operator.version}, from {registry.origins[key]}", highlight=False)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for spec in operator.specs:
            table.add_row(f"  {spec.id} {spec.version}", escape(spec.doc))
        console.print(table)
    if not registry.operators:
        console.print("no plugin is installed")


def _to_json(registry: Registry) -> list[dict[str, object]]:
    return [
        {
            "plugin": spec.id,
            "version": spec.version,
            "operator": f"{operator.domain}::{operator.operator}",
            "from": registry.origins[key],
            "computes": spec.doc,
            "inputs": [str(tensor) for tensor in spec.inputs],
            "outputs": [str(tensor) for tensor in spec.outputs],
            "dtypes": list(spec.dtypes),
            "attributes": {
                attribute.name: {"type": attribute.type, "doc": attribute.doc, "legal": list(attribute.legal)}
                for attribute in spec.attributes
            },
            "grid": [str(size) for size in spec.grid],
            "limits": [limit.text for limit in spec.limits],
        }
        for key, operator in registry.operators.items()
        for spec in operator.specs
    ]


@plugins.command("check")
@click.argument("model", type=click.Path(path_type=Path))
def check(model: Path) -> None:
    """Compare every plugin node of MODEL (a bundle, or an ONNX file) with the installed plugins.

    Operators that have a plugin are lowered first, in memory.

    Exit code 0: TensorRT will find every plugin and every node fits it; 3: one does not.
    """
    from doge_deploy.devices.packages import require_graph_packages

    require_graph_packages("plugins check")
    from rich.console import Console

    from doge_deploy.errors import UnsupportedModelError
    from doge_deploy.graph.preflight import check_file

    console = Console()
    verdicts = check_file(model)
    problems = _show_verdicts(console, verdicts)
    if not verdicts:
        console.print("no node needs a plugin")
    if problems:
        raise UnsupportedModelError(f"{model}: {problems} problems with plugins")


def _show_verdicts(console: object, verdicts: list[Verdict]) -> int:
    """Print what was found, the same about several nodes once; returns the number of problems."""
    from rich.console import Console

    assert isinstance(console, Console)
    if not verdicts:
        return 0
    good = [verdict for verdict in verdicts if not verdict.problems]
    console.print(f"{len(good)} of {len(verdicts)} plugin nodes fit", highlight=False)
    counts: dict[str, int] = {}
    for verdict in good:
        counts[verdict.node.id] = counts.get(verdict.node.id, 0) + 1
    for plugin, count in counts.items():
        console.print(f"  {count} x {plugin}", highlight=False)
    problems = 0
    for verdict in verdicts:
        for problem in verdict.problems:
            problems += 1
            console.print(f"  {verdict.node.name}: {problem}", style="red", highlight=False, markup=False)
    for text in sorted({text for verdict in verdicts for text in verdict.undecided}):
        console.print(f"  not decided here, depends on sizes that the graph leaves open: {text}", highlight=False)
    return problems

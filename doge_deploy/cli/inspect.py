"""`doge-deploy inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from doge_deploy.config.revisions import REVISIONS
from doge_deploy.graph.weight_formats import format_of

if TYPE_CHECKING:
    from rich.table import Table

    from doge_deploy.bundle.manifest import Layout, Manifest
    from doge_deploy.bundle.opening import Bundle


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The manifest, or an engine's record and layers, as JSON.")
@click.option("--layers", is_flag=True, help="Of an engine: every layer.")
def inspect(bundle: Path, as_json: bool, layers: bool) -> None:
    """Show what BUNDLE is, and check the hash of every file.

    BUNDLE may also be an engine in a bundle (BUNDLE/engines/NAME): then that engine is shown, from what was found when
    it was built.

    Exit code 3: a file is missing or was altered.
    """
    from doge_deploy.bundle.opening import open_bundle
    from doge_deploy.cli.inspect_engine import find_engine, show_engine

    engine = find_engine(bundle)
    if engine is not None:
        show_engine(open_bundle(engine[0]), engine[1], as_json=as_json, layers=layers)
        return
    if layers:
        raise click.UsageError(f"--layers is for an engine, and {bundle} is not one: give BUNDLE/engines/NAME")
    opened = open_bundle(bundle)
    if as_json:
        import json

        click.echo(json.dumps(opened.manifest.to_json(), indent=2, ensure_ascii=False))
        return
    _show(opened)


def _show(bundle: Bundle) -> None:
    from rich.console import Console

    console = Console()
    manifest, facts, options = bundle.manifest, bundle.manifest.facts, bundle.manifest.options
    source = manifest.checkpoint["source"] or "a directory"
    body = f"mixture of {facts.num_experts} experts, {facts.num_experts_per_tok} per token" if facts.is_moe else "dense"
    merged = manifest.checkpoint.get("adapter")
    rows = {
        "checkpoint": f"{source}, weights sha256 {manifest.checkpoint['sha256'][:16]}...",
        **(
            {"adapter": f"{merged['source'] or 'a directory'}, merged, sha256 {merged['sha256'][:16]}..."}
            if merged is not None
            else {}
        ),
        "model": f"Doge, {body}; hidden {facts.hidden_size}, {facts.num_hidden_layers} layers, "
        f"{facts.num_attention_heads}/{facts.num_key_value_heads} heads of {facts.head_dim}, vocabulary "
        f"{facts.vocab_size}",
        "revision": f"{facts.revision} ({REVISIONS[facts.revision].title})" if facts.is_legacy else facts.revision,
        "task": manifest.task,
        "window": _window(bundle),
        "dtype": f"{options.dtype}, scores fp32",
        **({"weights": str(stored_as)} if (stored_as := format_of(options)) else {}),
        **_logits(manifest),
        **({"routing": options.routing} if facts.is_moe else {}),
        "made by": ", ".join(f"{name} {version}" for name, version in _tools(bundle).items()),
    }
    console.print(_grid(rows), highlight=False)
    for name, layout in manifest.layouts.items():
        console.print(f"\n[bold]{name}[/bold] ({layout.file})", highlight=False)
        for note in layout.notes:
            console.print(f"  note: {note}", highlight=False)
        for line in _lowering(layout):
            console.print(f"  {line}", highlight=False)
        console.print(_signature(layout), highlight=False)
    for name, record in manifest.engines.items():
        console.print(
            f"\n[bold]engine {name}[/bold]: {record.product} {record.version}, {record.engine_bytes / 1e6:.1f} MB, "
            f"profiles {', '.join(profile.name for profile in record.profiles)}; more: inspect "
            f"{bundle.path / record.directory}",
            highlight=False,
        )
    for warning in manifest.warnings:
        console.print(f"\nwarning: {warning}", style="yellow", highlight=False)
    total = sum(entry["bytes"] for entry in manifest.files.values())
    console.print(
        f"\n{len(manifest.files)} files, {total / 1e6:.1f} MB, every sha256 as in the manifest", highlight=False
    )


def _logits(manifest: Manifest) -> dict[str, str]:
    """Of which tokens there are logits, where that was a choice."""
    if manifest.task != "causal-lm":
        return {}
    return {"logits": f"of the {'last token' if manifest.options.logits == 'last' else 'whole call'}"}


def _window(bundle: Bundle) -> str:
    facts = bundle.manifest.facts
    if not REVISIONS[facts.revision].drops_keys:
        return "none: this revision keeps every key"
    return f"{facts.keep_window_size} keys kept of at most {bundle.manifest.max_length}"


def _lowering(layout: Layout) -> Iterator[str]:
    for name, lowered in layout.lowered.items():
        title = _title(name)
        if lowered.file is not None:
            yield f"for {title}: {lowered.file} ({', '.join(lowered.applied)})"
        steps: dict[str, list[str]] = {}
        for step, reason in lowered.declined.items():
            steps.setdefault(reason, []).append(step)
        for reason, declined in steps.items():
            yield f"for {title}: declined by {', '.join(declined)}: {reason}"


def _title(backend: str) -> str:
    """The backend's name for people; a bundle may have been lowered for one that is not installed here."""
    from doge_deploy.targets.backend import find, names

    return find(backend).title if backend in names() else f"the backend {backend}"


def _tools(bundle: Bundle) -> dict[str, str]:
    tool = bundle.manifest.tool
    return {tool["name"]: tool["version"], **bundle.manifest.libraries}


def _grid(rows: dict[str, str]) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        grid.add_row(f"[bold]{key}[/bold]", value)
    return grid


def _signature(layout: Layout) -> Table:
    """Inputs and outputs; the caches of all layers in one row per kind."""
    from rich.table import Table

    table = Table("", "name", "dtype", "shape")
    for side, specs in (("in", layout.signature.inputs), ("out", layout.signature.outputs)):
        seen = set()
        for spec in specs:
            parts = spec.name.split(".")
            name = ".".join(("{i}" if part.isdigit() else part) for part in parts)
            if name not in seen:
                seen.add(name)
                table.add_row(side, name, spec.dtype, f"\\[{', '.join(map(str, spec.shape))}]")
    return table

"""`doge-deploy plugins compile`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from doge_deploy.devices.host import available_cpus
from doge_deploy.dtypes import NAMES

if TYPE_CHECKING:
    from doge_deploy.kernels.compile import Compiled, Record
    from doge_deploy.kernels.spec import Binding

FILE_COLUMNS = 140
"""Of the table where it goes into a file or a pipe, which have no width of their own."""


@click.command("compile")
@click.option("--arch", "archs", metavar="LIST", help="Compute capabilities: sm_87,sm_120.")
@click.option("--all", "all_archs", is_flag=True, help="Every compute capability that the kernels support.")
@click.option("--model", metavar="MODEL", help="Compile for this checkpoint's sizes. Default: the published models'.")
@click.option("--head-dim", "head_dims", metavar="LIST", help="Head sizes, instead of the model's.  [default: 64,128]")
@click.option("--dtype", "dtypes", metavar="LIST", default="fp16", show_default=True, help="fp32,fp16,bf16")
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Only this kernel; repeatable.")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="DIR", help="Write PTX and records here.")
@click.option("--machine-code", is_flag=True, help="Show what the machine code multiplies with, loads and spills.")
@click.option("--jobs", type=click.IntRange(min=1), default=available_cpus, help="Compilers at once.")
def compile_command(
    archs: str | None,
    all_archs: bool,
    model: str | None,
    head_dims: str | None,
    dtypes: str,
    kernels: tuple[str, ...],
    output: Path | None,
    machine_code: bool,
    jobs: int,
) -> None:
    """Compile kernels to PTX, without a GPU, and show what ptxas says of each.

    Results are cached by content; the same input gives the same bytes.

    Exit code 3: a kernel does not compile, or does not fit a device.
    """
    from doge_deploy.errors import UsageError

    if all_archs == (archs is not None):
        raise UsageError("name devices with --arch sm_87,... or take them all with --all")
    from rich.console import Console
    from rich.table import Table

    from doge_deploy.kernels.compile import compile_all, is_supported, write
    from doge_deploy.kernels.devices import DEVICES, parse_arch

    chosen = list(DEVICES) if archs is None else [parse_arch(arch) for arch in _list(archs)]
    bound = [
        binding
        for dtype in _parse_dtypes(dtypes)
        for binding in _bindings(model, _parse_sizes(head_dims), dtype, frozenset(kernels))
    ]
    work = [(binding, arch) for arch in chosen for binding in bound if is_supported(binding, arch)]
    unsupported = [arch for arch in chosen if any(not is_supported(binding, arch) for binding in bound)]
    table = Table(box=None, pad_edge=False)
    for name, justify in [("device", "left"), ("kernel", "left"), ("dtype", "left"), ("sizes", "left")]:
        table.add_column(name, justify=justify, no_wrap=name != "sizes")  # type: ignore[arg-type]
    for name in ("registers", "spills", "shared", "threads"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("matrix products", "widest load", "local") if machine_code else ():
        table.add_column(name, justify="right", no_wrap=True)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=FILE_COLUMNS)
    spilled = 0
    with console.status(f"compile {len(work)} kernels"):
        for (binding, arch), compiled in zip(work, compile_all(work, processes=jobs), strict=True):
            record = compiled.record
            spilled += record.spill_bytes > 0
            more = _machine_code(compiled) if machine_code else ()
            table.add_row(*_row(binding, record), *more, style="yellow" if record.spill_bytes else None)
            if output is not None:
                write(compiled, output / f"sm_{arch}" / _file_name(binding, record))
    console.print(table)
    console.print(f"{len(work)} kernels compiled, {spilled} of them spill registers", highlight=False)
    for arch in unsupported:
        console.print(f"sm_{arch} has no bfloat16: left out there", highlight=False)
    if output is not None:
        console.print(f"written to {output}", highlight=False)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_dtypes(text: str) -> list[str]:
    from doge_deploy.errors import UsageError

    for name in _list(text):
        if name not in NAMES:
            raise UsageError(f"--dtype {name}: must be one of {', '.join(NAMES)}")
    return [NAMES[name] for name in _list(text)]


def _parse_sizes(text: str | None) -> list[int] | None:
    from doge_deploy.errors import UsageError

    if text is None:
        return None
    for size in _list(text):
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--head-dim {size}: must be a whole number >= 1")
    return [int(size) for size in _list(text)]


def _bindings(model: str | None, head_dims: Sequence[int] | None, dtype: str, names: frozenset[str]) -> list[Binding]:
    from dataclasses import replace

    from doge_deploy.kernels.registry import installed
    from doge_deploy.kernels.samples import Model, bindings, published

    if model is None:
        models = [published(size) for size in head_dims or (64, 128)]
    else:
        from doge_deploy.checkpoint import open_checkpoint

        sizes = Model.of(open_checkpoint(model).facts)
        models = [replace(sizes, head_dim=size) for size in head_dims or (sizes.head_dim,)]
    registry = installed()
    found: dict[str, Binding] = {}
    for sizes in models:
        for binding in bindings(registry, sizes, dtype, names):
            # a kernel that does not know the head size is the same for all
            found.setdefault(f"{binding.spec.id} {_sizes(binding)} {sorted(_attributes(binding).items())}", binding)
    return list(found.values())


def _attributes(binding: Binding) -> dict[str, object]:
    return {attribute.name: binding.values[attribute.name] for attribute in binding.spec.attributes}


def _sizes(binding: Binding) -> str:
    parts = [f"{name}={binding.values[name]}" for name in binding.spec.static]
    hidden = {"scale"}  # follows from the head size
    parts += [f"{name}={value}" for name, value in _attributes(binding).items() if name not in hidden]
    return " ".join(parts)


def _row(binding: Binding, record: Record) -> list[str]:
    return [
        f"sm_{record.arch}",
        binding.spec.name,
        next(short for short, name in NAMES.items() if name == record.dtype),
        _sizes(binding),
        str(record.registers),
        str(record.spill_bytes),
        str(record.shared_memory_bytes),
        str(record.threads),
    ]


def _machine_code(compiled: Compiled) -> Iterator[str]:
    """Instructions that multiply matrices, bits of the widest load, loads and stores of local memory."""
    from doge_deploy.kernels.machine_code import machine_code

    code = machine_code(compiled)
    yield " ".join(f"{name} {count}" for name, count in code.matrix_products.items()) or "-"
    yield str(code.widest_load)
    yield str(code.local_accesses)


def _file_name(binding: Binding, record: Record) -> str:
    return f"{binding.spec.name}-{record.dtype}-{record.ptx_sha256[:12]}"

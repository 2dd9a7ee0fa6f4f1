"""How near the products with weights come to what this machine can do: python product_limits.py BUNDLE...

One thread. For a decode step of one row and of eight, and for a prompt of 512, the time of the products (the shortest
run of each, by ONNX Runtime's profiler) beside two bounds: the bytes of the weights over the memory bandwidth, and
their multiplications and additions over the rate of the fastest library that is installed, in float32 or, for weights
of 4 and 8 bits, in 8 bits. Above 100 % of the bandwidth, weights stay in the last-level cache.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from statistics import median

import click
from operator_times import WARM_UP, record, shortest

from doge_deploy.bench.candidates import weights_of
from doge_deploy.bench.machine import this_machine
from doge_deploy.bench.process import WorkerProcess
from doge_deploy.bench.products import OPERATIONS
from doge_deploy.bench.roofline import buffer_bytes
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.checkpoint.names import EMBEDDING, HEAD, expected_tensors
from doge_deploy.graph.decode_traffic import bundle_traffic

PRODUCTS = ("MatMul", "FusedMatMul", "MatMulNBits")

CALLS = {"decode, 1 row": (1, 0), "decode, 8 rows": (8, 0), "a prompt of 512": (1, 512)}
"""Name: rows, and tokens of a prompt or 0."""


def operations(bundle: Bundle, rows: int, tokens: int) -> int:
    """Multiplications and additions by all matrices; by the head for the last token of a row."""
    facts = bundle.manifest.facts
    tensors = {name: shape for name, shape in expected_tensors(facts).items() if len(shape) == 2}
    head = prod(tensors[EMBEDDING])
    body = sum(prod(shape) for name, shape in tensors.items() if name not in (EMBEDDING, HEAD))
    return 2 * rows * (body * max(tokens, 1) + head)


def products_us(bundle: Path, rows: int, prompt: int) -> float:
    """Microseconds of all products of a call, without what it takes to note them."""
    steps = 8 if prompt else 100
    events = record(bundle, threads=1, prompt=prompt, steps=steps, portable=False, batch=rows)
    found = shortest(events, WARM_UP if prompt else WARM_UP + 1)
    noting = median(found["Reshape"])
    return sum(max(0.0, time - noting) for kind in PRODUCTS for time in found.get(kind, []))


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def cli(bundles: tuple[Path, ...]) -> None:
    """Print a table."""
    with WorkerProcess(1) as probe:
        nbytes = probe.ask("probe", threads=1, nbytes=buffer_bytes(this_machine().last_level_cache_bytes))["nbytes"]
        bandwidth = nbytes / min(probe.ask("sweep")["sweeps_ns"]) * 1e9
        times = probe.ask("multiply", threads=1)["products_ns"]
    rates = {dtype: OPERATIONS / min(min(one) for one in found.values()) * 1e9 for dtype, found in times.items()}
    for dtype, rate in rates.items():
        click.echo(f"{dtype}: {rate / 1e9:.0f} G operations/s")
    click.echo(f"memory: {bandwidth / 1e9:.1f} GB/s\n")
    click.echo("| bundle | call | products, us | of the bandwidth | of the rate |\n| --- | --- | --- | --- | --- |")
    for path in bundles:
        bundle = open_bundle(path)
        layout = bundle.layout("static")
        nbytes = bundle_traffic(bundle, layout, batch_size=1, keys=1).weight_bytes
        rate = rates["int8" if weights_of(bundle) in ("int8", "int4") else "float32"]
        for name, (rows, prompt) in CALLS.items():
            us = products_us(path, rows, prompt)
            share = operations(bundle, rows, prompt) / (us * 1e-6) / rate
            of_bandwidth = nbytes / (us * 1e-6) / bandwidth
            row = [f"{path.parent.name} {path.name}", name, f"{us:.0f}", f"{of_bandwidth:.0%}", f"{share:.0%}"]
            click.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    cli()

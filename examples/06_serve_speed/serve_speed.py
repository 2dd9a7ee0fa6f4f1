"""How fast `doge-deploy serve` is, beside transformers' own server and a plain web server around `generate`.

python serve_speed.py prepare DIR                      checkpoints of random weights and their bundles
python serve_speed.py run DIR --size 20M [...]         DIR/results/20M.json: all candidates in turns
python serve_speed.py alone DIR --size 20M [...]       the server and its scheduler without HTTP, in turns
python serve_speed.py first DIR --size 20M [...]       first tokens of 8 prompts at once, and the least that is possible
python serve_speed.py versions DIR OTHER [...]         the same of this and of another version of the sources, in turns
python serve_speed.py gap DIR --size 20M [...]         what a long prompt does to streams, by --step-tokens
python serve_speed.py table DIR                        the results as tables
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import load

from doge_deploy.serve.scheduler import Limits

HERE = Path(__file__).parent
MAKE_RANDOM = HERE.parent / "02_published_sizes" / "make_random.py"
KINDS = {"fp32": (), "int8": ("--quantize", "int8")}
"""Kind of bundle: options of `export`."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Candidate:
    """A server."""

    name: str
    command: tuple[str, ...]
    """Starts it; `PORT` stands for the port."""
    model: str
    """What a request calls its model."""
    sources: str = ""
    """Where another version of doge_deploy lies; this one where empty."""


@dataclass
class Server:
    """A server that runs."""

    candidate: Candidate
    port: int
    process: subprocess.Popen[bytes]
    loads: list[load.Load] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """CPU time that its process took during each of them, in seconds."""

    def seconds(self) -> float:
        """CPU time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


def write_tokenizer(directory: Path, vocabulary: int = 32768) -> None:
    """One word a token, so that each token is a piece of text and each word of a prompt is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    words = names + [f"w{number}" for number in range(len(names), vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=names[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(names)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0], "eos_token": names[1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def call(*command: str | Path) -> None:
    click.echo(" ".join(map(str, command)), err=True)
    subprocess.run([str(part) for part in command], check=True)


@click.group()
def cli() -> None:
    """Speed of the server."""


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--size", "sizes", multiple=True, default=("20M", "60M"))
def prepare(directory: Path, sizes: Sequence[str]) -> None:
    """Make what is not there yet."""
    for size in sizes:
        checkpoint = directory / size / "checkpoint"
        if not checkpoint.is_dir():
            call(sys.executable, MAKE_RANDOM, size, checkpoint)
            write_tokenizer(checkpoint)
        for kind, options in KINDS.items():
            bundle = directory / size / kind
            if not bundle.is_dir():
                call(sys.executable, "-m", "doge_deploy.cli", "export", checkpoint, "-o", bundle, *options)


def candidates(directory: Path, size: str, transformers: Path | None, threads: int) -> list[Candidate]:
    """All servers of a size; those of transformers where its `python` is given."""
    found = []
    for kind in KINDS:
        command = (sys.executable, "-m", "doge_deploy.cli", "serve", str(directory / size / kind), "--port", "PORT")
        options = ("--slots", "16", "--no-speculate", "--served-model-name", kind)
        found.append(Candidate(f"doge-deploy {kind}", (*command, *options), kind))
    if transformers is not None:
        checkpoint = str(directory / size / "checkpoint")
        serve = (str(transformers.parent / "transformers"), "serve", checkpoint, "--device", "cpu", "--port", "PORT")
        for dtype in ("float32", "bfloat16"):
            command = (*serve, "--dtype", dtype, "--host", "127.0.0.1")
            found.append(Candidate(f"transformers serve {dtype}", command, checkpoint))
        plain = (str(transformers), str(HERE / "plain_server.py"), checkpoint, "PORT", str(threads))
        found.append(Candidate("plain server", plain, checkpoint))
    return found


@contextlib.contextmanager
def running(candidate: Candidate, log: Path) -> Iterator[Server]:
    """The server, from its first answer on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(port) if part == "PORT" else part for part in candidate.command]
    env = dict(os.environ)
    if candidate.sources:  # and not those of the folder where this is run, which `-m` would put first
        env |= {"PYTHONPATH": candidate.sources, "PYTHONSAFEPATH": "1"}
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=env) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise click.ClickException(f"{candidate.name} did not start:\n{log.read_text()[-2000:]}")
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                time.sleep(0.2)
            yield Server(candidate, port, process)
        finally:
            process.terminate()


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--size", default="20M")
@click.option("--clients", default="1,4,8,16", help="Numbers of clients, with commas.")
@click.option("--rounds", default=3)
@click.option(
    "--answers", default=1, help="Of each client in a round, from transformers; doge-deploy gives four times as many."
)
@click.option("--transformers", type=click.Path(path_type=Path), help="A python that has transformers[serving].")
@click.option("--spread", default=0.0, help="Of the lengths of answers; 0.5: 32 to 96 tokens.")
@click.option("--only", default="", help="Candidates whose name holds this.")
@click.option("--output", type=click.Path(path_type=Path), help="DIR/results/SIZE.json where it is not given.")
def run(
    directory: Path,
    size: str,
    clients: str,
    rounds: int,
    answers: int,
    transformers: Path | None,
    spread: float,
    only: str,
    output: Path | None,
) -> None:
    """Load all servers in turns, in an order that is rotated every round."""
    results = directory / "results"
    results.mkdir(exist_ok=True)
    counts = [int(number) for number in clients.split(",")]
    found = [one for one in candidates(directory, size, transformers, os.cpu_count() or 1) if only in one.name]
    if not found:
        raise click.UsageError(f"--only {only}: no candidate has that in its name")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(one, results / f"{one.name.replace(' ', '-')}.log")) for one in found]
        for server in servers:  # the first answers take longer, and are not counted
            load.run(server.port, server.candidate.model, max(counts), 1, new=4, seed=99)
        for number in range(rounds):
            for count in counts:
                for server in servers[number % len(servers) :] + servers[: number % len(servers)]:
                    ours = server.candidate.name.startswith("doge-deploy")
                    time.sleep(0.3)
                    before = server.seconds()
                    name, times = server.candidate.model, answers * (4 if ours else 1)
                    server.loads.append(load.run(server.port, name, count, times, spread=spread, seed=number))
                    server.cpu.append(server.seconds() - before)
    runs = {
        one.candidate.name: [{**found.json(), "server_cpu": cpu} for found, cpu in zip(one.loads, one.cpu, strict=True)]
        for one in servers
    }
    target = output or results / f"{size}.json"
    target.write_text(json.dumps(runs) + "\n")
    show(size, runs)


def show(size: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """A Markdown table; throughput with the smallest and largest of a round, and over that of each baseline."""
    baselines = [name for name in runs if not name.startswith("doge-deploy")]
    ratios = " | ".join(f"times {name}" for name in baselines)
    click.echo(
        f"\n| {size} | clients | tok/s | first token ms, p95 | gap ms, p95 | CPUs: server, clients"
        f"{' | ' + ratios if baselines else ''} |"
    )
    click.echo("| --- " * (6 + len(baselines)) + "|")
    for name, all_runs in runs.items():
        for count in dict.fromkeys(one["clients"] for one in all_runs):
            row = [str(name), str(count), *_cells(_loads(all_runs, count), all_runs, count)]
            for baseline in baselines:
                row.append(_ratio(_loads(all_runs, count), _loads(runs[baseline], count)) if name != baseline else "")
            click.echo("| " + " | ".join(row) + " |")


def _loads(runs: list[dict[str, Any]], count: int) -> list[load.Load]:
    plain = [{key: value for key, value in one.items() if key != "server_cpu"} for one in runs]
    return [load.Load(**one) for one in plain if one["clients"] == count]


def _cells(loads: list[load.Load], runs: list[dict[str, Any]], count: int) -> Iterator[str]:
    rates = [one.throughput for one in loads]
    yield f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
    first = [value for one in loads for value in one.first]
    gaps = [value for one in loads for value in one.gaps]
    yield f"{1e3 * median(first):.1f}, {1e3 * load.percentile(first, 0.95):.1f}"
    yield f"{1e3 * median(gaps):.2f}, {1e3 * load.percentile(gaps, 0.95):.2f}"
    seconds = sum(one.seconds for one in loads)
    server = sum(one["server_cpu"] for one in runs if one["clients"] == count)
    yield f"{server / seconds:.2f}, {sum(one.client_cpu for one in loads) / seconds:.2f}"


def _ratio(mine: list[load.Load], theirs: list[load.Load]) -> str:
    rounds = [one.throughput / other.throughput for one, other in zip(mine, theirs, strict=True)]
    return f"{median(rounds):.1f} ({min(rounds):.1f} to {max(rounds):.1f})"


def of_doge(directory: Path, size: str, kind: str, *options: str) -> Candidate:
    """Our server with further options."""
    found = next(one for one in candidates(directory, size, None, 0) if one.model == kind)
    return Candidate(" ".join((found.name, *options)), (*found.command, *options), kind)


def bare(bundle: Path, kind: str) -> Candidate:
    """The least server over HTTP."""
    return Candidate("bare", (sys.executable, str(HERE / "bare.py"), str(bundle), "PORT"), kind)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--size", "sizes", multiple=True, default=("20M", "60M"))
@click.option("--kind", "kinds", multiple=True, default=tuple(KINDS))
@click.option("--clients", default="1,8,16")
@click.option("--rounds", default=5)
@click.option("--answers", default=3, help="Of each client in a round.")
def alone(directory: Path, sizes: Sequence[str], kinds: Sequence[str], clients: str, rounds: int, answers: int) -> None:
    """Throughput over HTTP over that of the scheduler alone, in turns, and what the least server over HTTP reaches."""
    click.echo(
        "| bundle | clients | tok/s over HTTP | bare | scheduler alone | HTTP over alone | bare over alone "
        "| HTTP over bare | us of the clients' CPU a token |"
    )
    click.echo("| --- " * 9 + "|")
    for size in sizes:
        for kind in kinds:
            bundle = directory / size / kind
            with (
                running(of_doge(directory, size, kind), directory / "alone.log") as server,
                running(bare(bundle, kind), directory / "bare.log") as least,
                subprocess.Popen(
                    [sys.executable, str(HERE / "alone.py"), str(bundle)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                ) as driver,
            ):
                found: dict[int, list[list[float]]] = {}
                for number in range(-1, rounds):  # the first round is not counted
                    for count in map(int, clients.split(",")):
                        rates, cpu = [0.0, 0.0, 0.0], 0.0
                        for turn in range(3):
                            which = (number + turn) % 3
                            if which == 2:
                                rates[2] = _alone(driver, count, answers, seed=3 * number + 50 + turn)
                                continue
                            port = (server, least)[which].port
                            over = load.run(port, kind, count, answers, seed=3 * number + 50 + turn)
                            rates[which] = over.throughput
                            cpu = over.client_cpu / over.tokens if which == 0 else cpu
                        if number >= 0:
                            found.setdefault(count, []).append([*rates, 1e6 * cpu])
                assert driver.stdin is not None
                driver.stdin.close()
            for count, rows in found.items():
                http, less, alone, cpu = (median(column) for column in zip(*rows, strict=True))
                cells = [_spread([row[a] / row[b] for row in rows]) for a, b in ((0, 2), (1, 2), (0, 1))]
                figures = [f"{rate:.0f}" for rate in (http, less, alone)]
                click.echo("| " + " | ".join([f"{size} {kind}", str(count), *figures, *cells, f"{cpu:.0f}"]) + " |")


def _alone(driver: subprocess.Popen[str], clients: int, answers: int, seed: int) -> float:
    assert driver.stdin is not None and driver.stdout is not None
    driver.stdin.write(f"{clients} {answers} {seed}\n")
    driver.stdin.flush()
    return float(driver.stdout.readline())


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


class Products:
    """Calls of a bundle's graph in a process of their own (`prefill.py`), timed while no server has work."""

    def __init__(self, bundle: Path) -> None:
        command = [sys.executable, str(HERE / "prefill.py"), str(bundle)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Products:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()

    def ask(self, *line: str | int) -> list[float]:
        """Seconds of each call; see `prefill.py`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, line)) + "\n")
        self._process.stdin.flush()
        found: list[float] = json.loads(self._process.stdout.readline())
        return found


GROUPS = (1, 2, 4, 8)
"""Prompts that are fed in one call."""


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--size", "sizes", multiple=True, default=("20M", "60M"))
@click.option("--kind", "kinds", multiple=True, default=tuple(KINDS))
@click.option("--rounds", default=10)
def first(directory: Path, sizes: Sequence[str], kinds: Sequence[str], rounds: int) -> None:
    """Time to first token of 8 prompts of 64 tokens that arrive at the same moment, over that of one alone, and what
    the calls themselves allow: a prompt waits for all calls before its own. The best order is that of calls of 1, 2, 4
    or 8 prompts, in any mixture and with nothing between them, whose median is least.
    """
    click.echo(
        "| bundle | first token of one ms | of 8: median, p95 | over one: median, p95 "
        "| the least that calls allow: median, p95 | prompts in its calls | calls of 1, 2, 4, 8 prompts ms |"
    )
    click.echo("| --- " * 7 + "|")
    for size in sizes:
        for kind in kinds:
            log = directory / "first.log"
            with running(of_doge(directory, size, kind), log) as server, Products(directory / size / kind) as products:
                ones: list[float] = []
                eights: list[float] = []
                calls: list[list[float]] = []
                for number in range(-1, rounds):  # the first round is not counted
                    one = load.run(server.port, kind, 1, 2, new=8, seed=3 * number + 500)
                    eight = load.run(server.port, kind, 8, 1, new=8, seed=3 * number + 501)
                    times = products.ask("together", 64, *GROUPS)
                    if number >= 0:
                        ones += one.first
                        eights += eight.first
                        calls.append(times)
            alone, costs = median(ones), [median(column) for column in zip(*calls, strict=True)]
            rest = max(alone - costs[0], 0.0)  # HTTP, tokenizer, sampling: whatever else a first token takes
            cost_of = dict(zip(GROUPS, costs, strict=True))
            best = min(_orders(8), key=lambda order: median(_waits(order, cost_of)))
            least = [rest + wait for wait in _waits(best, cost_of)]
            shown = (
                f"{size} {kind}",
                f"{1e3 * alone:.1f}",
                f"{1e3 * median(eights):.1f}, {1e3 * load.percentile(eights, 0.95):.1f}",
                f"{median(eights) / alone:.2f}, {load.percentile(eights, 0.95) / alone:.2f}",
                f"{median(least) / alone:.2f}, {load.percentile(least, 0.95) / alone:.2f}",
                " + ".join(map(str, best)),
                ", ".join(f"{1e3 * cost:.1f}" for cost in costs),
            )
            click.echo(f"| {' | '.join(shown)} |")


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--size", "sizes", multiple=True, default=("20M", "60M"))
@click.option("--kind", "kinds", multiple=True, default=tuple(KINDS))
@click.option("--clients", default=8)
@click.option("--answers", default=8, help="Of each client in a round.")
@click.option("--spread", default=0.0, help="Of the lengths of answers; 0.5: 32 to 96 tokens.")
@click.option("--rounds", default=6)
@click.option("--other", type=click.Path(path_type=Path, exists=True), help="A folder with other sources, in turns.")
def loop(
    directory: Path,
    sizes: Sequence[str],
    kinds: Sequence[str],
    clients: int,
    answers: int,
    spread: float,
    rounds: int,
    other: Path | None,
) -> None:
    """Time to first token of clients that ask again as soon as they have an answer, over that of one such client. With
    --other the same of other sources; `versions` says how to fill their folder.
    """
    click.echo(
        "| bundle | sources | first token of one ms | of all: median, p95 | over one: median, smallest, largest round "
        "| tok/s, smallest, largest round |"
    )
    click.echo("| --- " * 6 + "|")
    for size in sizes:
        for kind in kinds:
            these = replace(of_doge(directory, size, kind), name="these")

            def measure(server: Server, number: int, kind: str = kind) -> tuple[load.Load, load.Load]:
                one = load.run(server.port, kind, 1, answers, spread=spread, seed=3 * number + 7)
                return one, load.run(server.port, kind, clients, answers, spread=spread, seed=3 * number + 8)

            for name, pairs in _both_sources(these, other, directory, rounds, 1, measure).items():
                rates = [every.throughput for _, every in pairs]
                click.echo(
                    f"| {size} {kind} | {name} | {_first_cells(pairs)} "
                    f"| {median(rates):.0f}, {min(rates):.0f}, {max(rates):.0f} |"
                )


def _both_sources(
    these: Candidate,
    other: Path | None,
    directory: Path,
    rounds: int,
    skipped: int,
    measure: Callable[[Server, int], tuple[load.Load, load.Load]],
) -> dict[str, list[tuple[load.Load, load.Load]]]:
    """What was measured of these sources, and in turns of those in a folder; some first rounds are not counted."""
    compared = [these, *([replace(these, name="other", sources=str(other.resolve()))] if other else [])]
    found: dict[str, list[tuple[load.Load, load.Load]]] = {one.name: [] for one in compared}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(one, directory / f"{one.name}.log")) for one in compared]
        for number in range(-skipped, rounds):
            for server in servers if number % 2 else servers[::-1]:
                loads = measure(server, number)
                if number >= 0:
                    found[server.candidate.name].append(loads)
    return found


def _first_cells(pairs: Sequence[tuple[load.Load, load.Load]]) -> str:
    """First tokens of one client, of many, and the second over the first."""
    alone = median(value for one, _ in pairs for value in one.first)
    first = [value for _, every in pairs for value in every.first]
    each = [median(every.first) / median(one.first) for one, every in pairs]
    return (
        f"{1e3 * alone:.1f} | {1e3 * median(first):.1f}, {1e3 * load.percentile(first, 0.95):.1f} "
        f"| {median(first) / alone:.2f}, {min(each):.2f}, {max(each):.2f}"
    )


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path, exists=True))
@click.option("--size", "sizes", multiple=True, default=("20M", "60M"))
@click.option("--kind", "kinds", multiple=True, default=tuple(KINDS))
@click.option("--rounds", default=7)
def versions(directory: Path, other: Path, sizes: Sequence[str], kinds: Sequence[str], rounds: int) -> None:
    """First tokens of 8 prompts that arrive at the same moment, by these sources and those in the folder OTHER, which
    `git archive COMMIT doge_deploy | tar -x -C OTHER` fills.
    """
    click.echo(
        "| bundle | sources | first token of one ms | of 8: median, p95 | over one: median, smallest, largest round |"
    )
    click.echo("| --- " * 5 + "|")
    for size in sizes:
        for kind in kinds:
            these = replace(of_doge(directory, size, kind), name="these")

            def measure(server: Server, number: int, kind: str = kind) -> tuple[load.Load, load.Load]:
                one = load.run(server.port, kind, 1, 2, new=8, seed=3 * number + 500)
                return one, load.run(server.port, kind, 8, 1, new=8, seed=3 * number + 501)

            for name, pairs in _both_sources(these, other, directory, rounds, 2, measure).items():
                click.echo(f"| {size} {kind} | {name} | {_first_cells(pairs)} |")


def _orders(prompts: int) -> Iterator[tuple[int, ...]]:
    """Every way to feed so many prompts in calls of `GROUPS`, one call after the other."""
    if not prompts:
        yield ()
    for group in GROUPS:
        if group <= prompts:
            yield from ((group, *rest) for rest in _orders(prompts - group))


def _waits(order: Sequence[int], cost_of: Mapping[int, float]) -> list[float]:
    """Seconds until the call of each prompt has ended."""
    waits: list[float] = []
    passed = 0.0
    for group in order:
        passed += cost_of[group]
        waits += [passed] * group
    return waits


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--size", "sizes", multiple=True, default=("20M", "60M"))
@click.option("--kind", default="int8")
@click.option("--streams", default=4)
@click.option("--rounds", default=4)
@click.option("--steps", default="64,128,256,512", help="Values of --step-tokens.")
def gap(directory: Path, sizes: Sequence[str], kind: str, streams: int, rounds: int, steps: str) -> None:
    """Gaps of streams while a prompt of 1,500 tokens arrives, its time to first token, and beside them the calls that a
    gap is made of, timed alone in the same run: a step of the streams and the longest of the prompt's pieces. The last
    row of a size is the least server over HTTP (`bare.py`), which has the default.
    """
    click.echo(
        "| bundle | step tokens | gap ms: median, p95, largest | a step, the longest piece alone ms "
        "| gap over both: median, p95, largest | first token of the long prompt ms |"
    )
    click.echo("| --- " * 6 + "|")
    for size in sizes:
        with contextlib.ExitStack() as stack:
            products = stack.enter_context(Products(directory / size / kind))
            servers = {
                step: stack.enter_context(
                    running(of_doge(directory, size, kind, "--step-tokens", step), directory / f"gap{step}.log")
                )
                for step in steps.split(",")
            }
            least = bare(directory / size / kind, kind)
            servers["bare"] = stack.enter_context(running(least, directory / "bare.log"))
            found: dict[str, tuple[list[float], list[float], list[float], list[float]]] = {}
            for number in range(-1, rounds):  # the first round is not counted
                for width, server in servers.items():
                    seen, other = load.run_with_long_prompt(server.port, kind, streams, seed=number + 9)
                    pieces = products.ask("chunk", 1500, Limits.step_tokens if width == "bare" else width)
                    one = products.ask("step", 128, streams)
                    if number >= 0:
                        gaps, firsts, steps_, longest = found.setdefault(width, ([], [], [], []))
                        gaps += seen.gaps
                        firsts += other.first
                        steps_.append(median(one))
                        longest.append(max(pieces))
        for width, (gaps, firsts, steps_, longest) in found.items():
            whole = median(steps_) + median(longest)
            three = (median(gaps), load.percentile(gaps, 0.95), max(gaps))
            click.echo(
                f"| {size} {kind} | {width} | {', '.join(f'{1e3 * one:.1f}' for one in three)} "
                f"| {1e3 * median(steps_):.1f}, {1e3 * median(longest):.1f} "
                f"| {', '.join(f'{one / whole:.2f}' for one in three)} | {1e3 * median(firsts):.0f} |"
            )


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
def table(directory: Path) -> None:
    """The tables of all results."""
    for file in sorted((directory / "results").glob("*.json")):
        show(file.stem, json.loads(file.read_text()))


if __name__ == "__main__":
    cli()

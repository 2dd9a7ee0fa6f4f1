"""`doge-deploy serve`: bundles behind OpenAI's HTTP interface."""

from __future__ import annotations

from pathlib import Path

import click

from doge_deploy.cli.runtime_options import runtime_options
from doge_deploy.errors import UsageError


@click.command("serve")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Texts that are generated at the same time.",
)
@runtime_options
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    metavar="NAME",
    help="Name of the bundle for clients; once per bundle.",
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Keys that clients must send, one per line."
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of https://... use the server from a browser; * for all of them. Can be repeated.",
)
@click.option("--no-auth", is_flag=True, help="Serve other machines without a key.")
@click.option("--max-queue", type=click.IntRange(min=1), default=256, show_default=True, help="Requests that may wait.")
@click.option(
    "--max-queue-tokens",
    type=click.IntRange(min=1),
    default=262_144,
    show_default=True,
    help="Prompt tokens that may wait.",
)
@click.option(
    "--step-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Prompt tokens per step: a long prompt delays other texts by at most this many.",
)
@click.option(
    "--verify-on-start",
    "recordings",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Serve only what passes `verify --recording FILE`; once per bundle.",
)
@click.option(
    "--drain-seconds",
    type=float,
    default=30.0,
    show_default=True,
    help="On SIGTERM, how long texts that run or wait may take to end.",
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the log."
)
def serve(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    slots: int,
    backend: str,
    engine: str | None,
    threads: int | None,
    spin: int | None,
    speculate: bool,
    names: tuple[str, ...],
    api_key_file: Path | None,
    cors_origins: tuple[str, ...],
    no_auth: bool,
    max_queue: int,
    max_queue_tokens: int,
    step_tokens: int,
    recordings: tuple[Path, ...],
    drain_seconds: float,
    log_format: str,
) -> None:
    """Serve BUNDLE... over HTTP, with the interface of OpenAI's API.

    Chat at http://127.0.0.1:8000/, clients at http://127.0.0.1:8000/v1. Ends on SIGTERM or Ctrl-C, when texts that run
    or wait are done.
    """
    if api_key_file is not None and no_auth:
        raise UsageError("--api-key-file and --no-auth contradict each other; give one of them")
    from doge_deploy.serve.logs import configure
    from doge_deploy.serve.scheduler import Limits
    from doge_deploy.serve.start import ServeOptions, run

    options = ServeOptions(
        host=host,
        port=port,
        slots=slots,
        backend=backend,
        engine=engine,
        threads=threads,
        spin=spin,
        speculate=speculate,
        names=names,
        api_key_file=api_key_file,
        cors_origins=cors_origins,
        no_auth=no_auth,
        recordings=recordings,
        drain_seconds=drain_seconds,
        limits=Limits(step_tokens, queue_requests=max_queue, queue_tokens=max_queue_tokens),
    )
    configure("json" if log_format == "json" else "text")
    run(bundles, options)

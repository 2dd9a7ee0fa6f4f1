"""`doge-deploy verify`."""

from __future__ import annotations

from pathlib import Path

import click

from doge_deploy.cli.backend_name import BackendName
from doge_deploy.options.backends import DEFAULT_BACKEND, TORCH_KERNELS


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--recording",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge by this file of `doge-deploy record`, without torch, transformers and the checkpoint.",
)
@click.option("--reference", metavar="MODEL", help="The checkpoint; default: what the bundle says it came from.")
@click.option("--adapter", metavar="DIRECTORY", help="The merged adapter; default: what the bundle says.")
@click.option("--layout", "layouts", multiple=True, metavar="static|growing", help="Only this layout; repeatable.")
@click.option(
    "--greedy-steps", type=click.IntRange(min=1), metavar="N", help="Tokens of the greedy case.  [default: 128]"
)
@click.option("--portable", is_flag=True, help="Judge the standard graph, not the one lowered for ONNX Runtime.")
@click.option(
    "--lowering",
    is_flag=True,
    help="Judge the static graph as it is lowered for TensorRT and TensorRT-RTX (without plugins), in ONNX Runtime.",
)
@click.option(
    "--backend",
    type=BackendName(TORCH_KERNELS),
    default=DEFAULT_BACKEND,
    show_default=True,
    help="What runs the bundle; torch-kernels: PyTorch, with the plugins' kernels on a CUDA device.",
)
@click.option("--engine", metavar="NAME", help="Which engine, where the backend has several.")
@click.option(
    "--localize",
    "localized",
    is_flag=True,
    help="Name the call, layer and stage of the first case that fails, and why.",
)
@click.option("--case", metavar="[LAYOUT/]NAME", help="With --localize: judge and localise this case alone.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write every number here.")
@click.option(
    "--junit", "junit_file", type=click.Path(path_type=Path), metavar="FILE", help="Write a JUnit report here."
)
def verify(
    bundle: Path,
    recording: Path | None,
    reference: str | None,
    adapter: str | None,
    layouts: tuple[str, ...],
    greedy_steps: int | None,
    portable: bool,
    lowering: bool,
    backend: str,
    engine: str | None,
    localized: bool,
    case: str | None,
    json_file: Path | None,
    junit_file: Path | None,
) -> None:
    """Compare BUNDLE with transformers in eager mode, call by call.

    A legacy Doge, which transformers cannot load, is compared with a reference of its own revision.

    Exit code 0: every number is within its calibrated tolerance; 1: one is not.
    """
    from doge_deploy.verify.needs import require_reference

    require_reference(recording, backend)
    from doge_deploy.verify import files

    for file in (json_file, junit_file):
        if file is not None:
            files.check_writable(file)
    from doge_deploy import api
    from doge_deploy.cli.localized import check_options, say
    from doge_deploy.cli.verify_table import VerifyTable
    from doge_deploy.errors import UsageError
    from doge_deploy.verify.cases import GREEDY_STEPS

    check_options(localized, case, backend, json_file or junit_file)
    if recording is not None and (localized or case is not None):
        raise UsageError(f"--recording {recording}: the localiser runs the reference itself; leave one of them out")
    steps = GREEDY_STEPS if greedy_steps is None else greedy_steps
    if case is not None:
        with VerifyTable() as table:
            found = api.localize(
                bundle,
                case,
                reference=reference,
                adapter=adapter,
                portable=portable,
                lowering=lowering,
                greedy_steps=steps,
                started=table.started,
            )
        say(found)
        found.require_passed()
        return

    with VerifyTable() as table:
        report = api.verify(
            bundle,
            recording=recording,
            reference=reference,
            adapter=adapter,
            layouts=layouts,
            greedy_steps=greedy_steps,
            portable=portable,
            lowering=lowering,
            backend=backend,
            engine=engine,
            started=table.started,
            finished=table.finished,
        )
    table.summary(report)
    if json_file is not None:
        files.write_json(report, json_file)
    if junit_file is not None:
        files.write_junit(report, junit_file)
    if localized:
        with VerifyTable() as table:
            found = api.localize(
                bundle,
                report=report,
                reference=reference,
                adapter=adapter,
                portable=portable,
                lowering=lowering,
                greedy_steps=steps,
                started=table.started,
            )
        say(found)
    report.require_passed()

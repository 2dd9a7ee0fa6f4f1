"""`doge-deploy verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from doge_deploy.cli.backend_name import BackendName
from doge_deploy.cli.verify_outputs import Outputs, command_line, output_options
from doge_deploy.options.backends import DEFAULT_BACKEND, TORCH_KERNELS

if TYPE_CHECKING:
    from doge_deploy.verify.localize.finding import Localization
    from doge_deploy.verify.report import Report


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--recording",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge by this file of `doge-deploy record`, without torch, transformers and the checkpoint.",
)
@click.option("--reference", metavar="MODEL", help="The checkpoint. Default: the one that the bundle names.")
@click.option("--adapter", metavar="DIRECTORY", help="The merged adapter. Default: the one that the bundle names.")
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
    "--lowering-for",
    metavar="BACKEND",
    help="Judge the static graph as it is lowered for this backend, in ONNX Runtime's CPU provider: cuda.",
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
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="OLD.json",
    help="An earlier --json: fail too where a case uses more than twice the share of its tolerance that it used then.",
)
@output_options
@click.pass_context
def verify(
    context: click.Context,
    bundle: Path,
    recording: Path | None,
    reference: str | None,
    adapter: str | None,
    layouts: tuple[str, ...],
    greedy_steps: int | None,
    portable: bool,
    lowering: bool,
    lowering_for: str | None,
    backend: str,
    engine: str | None,
    localized: bool,
    case: str | None,
    baseline: Path | None,
    outputs: Outputs,
) -> None:
    """Compare BUNDLE with transformers in eager mode, call by call.

    A legacy Doge, which transformers cannot load, is compared with a reference of its own revision.

    Exit code 0: every number is within its calibrated tolerance; 1: one is not, or a case drifts from the baseline.
    """
    from doge_deploy.verify.needs import require_reference

    require_reference(recording, backend)
    outputs.check()
    from doge_deploy import api
    from doge_deploy.cli.localized import check_options, say
    from doge_deploy.cli.verify_table import VerifyTable
    from doge_deploy.errors import UsageError
    from doge_deploy.verify.cases import GREEDY_STEPS

    check_options(localized, case, backend, outputs.first)
    if recording is not None and (localized or case is not None):
        raise UsageError(f"--recording {recording}: the localiser runs the reference itself; leave one of them out")
    if lowering_for is not None and (localized or case is not None):
        raise UsageError(f"--lowering-for {lowering_for}: the localiser knows the CPU's graphs and --lowering alone")
    if localized and lowering:
        from doge_deploy.bundle.opening import open_bundle
        from doge_deploy.verify.localize.run import check_lowering

        check_lowering(open_bundle(bundle, check="quick"))  # before everything is judged
    steps = GREEDY_STEPS if greedy_steps is None else greedy_steps

    def localize(case: str | None = None, report: Report | None = None) -> Localization:
        with VerifyTable() as table:
            found = api.localize(
                bundle,
                case,
                report=report,
                reference=reference,
                adapter=adapter,
                portable=portable,
                lowering=lowering,
                greedy_steps=steps,
                started=table.started,
            )
        say(found)
        return found

    if case is not None:
        localize(case).require_passed()
        return

    judged_by = () if recording is None else (f"the recording {recording}",)
    with VerifyTable(*judged_by) as table:
        report = api.verify(
            bundle,
            recording=recording,
            reference=reference,
            adapter=adapter,
            layouts=layouts,
            greedy_steps=greedy_steps,
            portable=portable,
            lowering=lowering,
            lowering_for=lowering_for,
            backend=backend,
            engine=engine,
            baseline=baseline,
            started=table.started,
            finished=table.finished,
        )
    report.command = command_line(context)
    table.summary(report)
    try:
        if localized:
            report.localized = tuple(localize(report=report).lines())
    finally:  # a place that is not found takes nothing from the numbers
        outputs.write(report)
    report.require_passed()

"""`python -m doge_deploy.verify.kernels FILE`: `plugins verify` where NumPy and cuda.core are all there is."""

from __future__ import annotations

import sys
from pathlib import Path

from doge_deploy.errors import DogeDeployError
from doge_deploy.verify.kernels.device import open_kernel_device
from doge_deploy.verify.kernels.judge import NodeResult, lines, open_kernels, verify_kernels


def verify_on_device(file: Path) -> None:
    """Verify on the first CUDA device, and print each node.

    Raises:
        DogeDeployError: see `verify_kernels` and `open_kernel_device`; MismatchError where something else came out.
    """
    open_kernels(file)  # a damaged file is told before a missing device
    device = open_kernel_device()
    write = sys.stdout.write
    write(f"{device.name}, sm_{device.arch}\n")

    def show(result: NodeResult, bandwidth: float) -> None:
        write("".join(f"{line}\n" for line in lines(result, bandwidth)))

    report = verify_kernels(file, device, finished=show)
    write(f"a large copy moves {report.bandwidth / 1e9:.0f} GB/s\n")
    passed = sum(not result.failures for result in report.results)
    write(f"{passed} of {len(report.results)} nodes compute what was recorded\n")
    report.require_passed()


def main(arguments: list[str]) -> int:
    """The exit code of `plugins verify`."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m doge_deploy.verify.kernels FILE\n")
        return 2
    try:
        verify_on_device(Path(arguments[0]))
    except DogeDeployError as error:
        sys.stderr.write(f"doge-deploy: error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

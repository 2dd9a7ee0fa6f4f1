"""What is said of `--threads` beyond the CPUs that there are."""

from __future__ import annotations


def threads_note(threads: int | None) -> str:
    """One line where fewer threads than asked for will run; empty otherwise."""
    from doge_deploy.devices.host import available_cpus

    cpus = available_cpus()
    if threads is None or threads <= cpus:
        return ""
    return (
        f"note: --threads {threads}: this process may use {cpus} CPU{'' if cpus == 1 else 's'}, and as many threads run"
    )

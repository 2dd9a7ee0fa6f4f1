"""What is said of `--threads` beyond the CPUs that there are."""

from __future__ import annotations


def threads_note(threads: int | None) -> str:
    """One line where fewer threads than asked for will run; empty otherwise."""
    from doge_deploy.devices.host import available_cpus

    cpus = available_cpus()
    if threads is None or threads <= cpus:
        return ""
    return f"note: --threads {threads}: CPUs that this process may use: {cpus}; as many threads run"

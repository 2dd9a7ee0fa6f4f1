"""The process that one candidate lives in; `process.py` sends it requests.

    {"do": "load", "candidate": {...}, "threads": 2}   import libraries, then load the model
    {"do": "first", "workload": {...}}                 the first calls
    {"do": "round", "workload": {...}}                 one timed round
    {"do": "memory"}                                   peak resident memory so far
    {"do": "make", "module": "naive", "request": {}}   make what a baseline needs (in a process that times nothing)
    {"do": "probe", "threads": 2, "nbytes": ...}       become a bandwidth probe
    {"do": "sweep"}                                    read the probe's array
    {"do": "multiply", "threads": 2}                   matrix products of every library that is here

Errors of this package are raised again by the other end; any other ends the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from doge_deploy.process.worker import serve

if TYPE_CHECKING:
    from doge_deploy.bench.products import ProductProbe
    from doge_deploy.bench.roofline import BandwidthProbe
    from doge_deploy.bench.workload import Workload
    from doge_deploy.runtime.base import IntArray, Runner


class Worker:
    """State of the process: a loaded candidate or a probe."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._vocab_size = 0
        self._probe: BandwidthProbe | None = None
        self._products: ProductProbe | None = None
        self.answers: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "first": self.first,
            "round": self.round,
            "memory": self.memory,
            "make": self.make,
            "probe": self.probe,
            "sweep": self.sweep,
            "multiply": self.multiply,
        }

    def load(self, candidate: dict[str, Any], threads: int) -> dict[str, Any]:
        from doge_deploy.bench.candidates import Candidate
        from doge_deploy.bench.opening import import_libraries, open_candidate
        from doge_deploy.devices.host import memory_bytes

        described = Candidate(**candidate)
        start = perf_counter_ns()
        import_libraries(described)
        imported, before = perf_counter_ns(), memory_bytes()
        self._runner = open_candidate(described, threads)
        self._vocab_size = described.vocab_size
        return {
            "import_ns": imported - start,
            "load_ns": perf_counter_ns() - imported,
            "imported_bytes": before,
            "loaded_bytes": memory_bytes(),
        }

    def first(self, workload: dict[str, Any]) -> dict[str, Any]:
        from doge_deploy.bench.measure import time_first_calls

        return asdict(time_first_calls(*self._run_of(workload)))

    def round(self, workload: dict[str, Any]) -> dict[str, Any]:
        from doge_deploy.bench.measure import time_round

        return asdict(time_round(*self._run_of(workload)))

    def _run_of(self, workload: dict[str, Any]) -> tuple[Runner, Workload, IntArray]:
        from doge_deploy.bench.workload import Workload

        assert self._runner is not None
        described = Workload(**workload)
        return self._runner, described, described.input_ids(self._vocab_size)

    def memory(self) -> dict[str, Any]:
        from doge_deploy.devices.host import peak_memory_bytes

        return {"peak_bytes": peak_memory_bytes()}

    def make(self, module: str, request: dict[str, Any]) -> dict[str, Any]:
        from doge_deploy.bench.baselines.catalog import make

        make(module, **request)
        return {}

    def probe(self, threads: int, nbytes: int) -> dict[str, Any]:
        from doge_deploy.bench.roofline import BandwidthProbe

        self._probe = BandwidthProbe(threads, nbytes)
        return {"nbytes": self._probe.nbytes}

    def sweep(self) -> dict[str, Any]:
        assert self._probe is not None
        return {"sweeps_ns": self._probe.time_sweeps()}

    def multiply(self, threads: int) -> dict[str, Any]:
        from doge_deploy.bench.products import ProductProbe

        self._products = self._products or ProductProbe(threads)
        return {"products_ns": self._products.time_products()}


def main() -> None:
    """Answer requests until there are no more."""
    worker = Worker()
    serve(lambda request: worker.answers[request.pop("do")](**request))


if __name__ == "__main__":
    main()

"""A build in a process of its own, seen from the command that waits for it."""

from __future__ import annotations

from doge_deploy.errors import MissingDependencyError
from doge_deploy.process.child import Child, ChildError, worker_command
from doge_deploy.process.progress import Progress
from doge_deploy.targets.trt.job import EVENTS, Advanced, Finished, Job
from doge_deploy.targets.trt.vendor import PRODUCTS

WORKER = worker_command("doge_deploy.targets.trt.worker")

_STEPS = 1000
"""Units of progress that a build is told in."""


def run_job(job: Job, progress: Progress) -> Finished:
    """Build in a process of its own, which ends with this one.

    Raises:
        UsageError, UnsupportedModelError, MissingDependencyError: what the process reports, or that it broke down.
    """
    advance = progress.stage("build engine", total=_STEPS)
    result: Finished | None = None
    told = 0
    try:
        with Child(WORKER) as child:
            child.send(job.model_dump(mode="json"))
            while (message := child.receive()) is not None:
                event = EVENTS.validate_python(message)
                if isinstance(event, Advanced):
                    now = int(event.fraction * _STEPS)
                    advance(now - told)
                    told = now
                else:
                    result = event
            if result is None:
                raise child.failure()
            child.finish()
    except ChildError as error:
        raise MissingDependencyError(
            f"the library of {PRODUCTS[job.target].name} broke down: its process {error}"
        ) from None
    advance(_STEPS - told)
    return result

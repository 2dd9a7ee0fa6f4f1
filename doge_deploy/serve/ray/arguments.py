"""What an application is built from: the arguments of `serve run`, or `args` in a file of Ray Serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from doge_deploy.diagnostics import suggest
from doge_deploy.errors import UsageError
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.serve.scheduler import Limits
from doge_deploy.serve.start import DEFAULT_SLOTS, ServeOptions


def _listed(value: Any) -> Any:
    """On a command line a list is written with commas."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_listed)]


class Arguments(BaseModel):
    """Names and defaults are those of `doge-deploy serve`, apart from what concerns replicas."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: Annotated[Names, Field(min_length=1)]
    """Directories, at the same place on every node that runs replicas."""
    names: Names = []
    """What clients call them, in their order."""
    backend: str = DEFAULT_BACKEND
    engine: str | None = None
    slots: Annotated[int, Field(ge=1)] = DEFAULT_SLOTS
    """Texts that a replica makes at once."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Of a replica: so many CPUs are set aside for it."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """Set aside for a replica."""
    speculate: bool = True
    step_tokens: Annotated[int, Field(ge=1)] = Limits.step_tokens
    replicas: Annotated[int, Field(ge=1)] | None = None
    """A fixed number; None: as many as the load needs, between the next two."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 4
    target_ongoing: Annotated[float, Field(gt=0)] | None = None
    """Requests for each replica that the number of replicas aims at; None: as many as slots."""
    upscale_delay_seconds: Annotated[float, Field(ge=0)] = 5.0
    downscale_delay_seconds: Annotated[float, Field(ge=0)] = 300.0
    fronts: Annotated[int, Field(ge=1)] = 1
    """Processes that pass requests on."""
    max_queue: Annotated[int, Field(ge=1)] = Limits.queue_requests
    """Requests that may wait in each front; the next one gets 429."""
    api_key_file: Path | None = None
    """On every node that runs a front."""
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long running texts may take to end when a replica is taken away."""
    health_seconds: Annotated[float, Field(gt=0)] = 5.0
    """How often a replica is asked whether its engines run."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> Arguments:
        """Check what was given.

        Raises:
            UsageError: a name is unknown, a value is not legal, or two contradict each other.
        """
        try:
            arguments = cls.model_validate(values)
        except ValidationError as error:
            found = error.errors()[0]
            name = ".".join(map(str, found["loc"]))
            if found["type"] == "extra_forbidden":
                known = tuple(cls.model_fields)
                raise UsageError(f"{name}: unknown argument{suggest(name, known)}; known: {', '.join(known)}") from None
            raise UsageError(f"{name}={found['input']!r}: {found['msg']}") from None
        if arguments.replicas is None and arguments.min_replicas > arguments.max_replicas:
            raise UsageError(
                f"min_replicas={arguments.min_replicas}: must be at most max_replicas={arguments.max_replicas}"
            )
        return arguments

    @property
    def options(self) -> ServeOptions:
        """Of the server that a replica is."""
        return ServeOptions(
            slots=self.slots,
            backend=self.backend,
            engine=self.engine,
            threads=self.threads,
            speculate=self.speculate,
            names=tuple(self.names),
            limits=Limits(step_tokens=self.step_tokens, queue_requests=self.ongoing),
        )

    @property
    def ongoing(self) -> int:
        """Requests that a replica is given at once: a few more than it has slots, so that none is idle between two. The
        others wait in the front, where whichever replica is free first gets them.
        """
        return self.slots + max(2, self.slots // 4)

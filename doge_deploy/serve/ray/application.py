"""The application of Ray Serve: two deployments, and how they speak with each other.

Reference: https://docs.ray.io/en/latest/serve/ (application builders, autoscaling, back-pressure).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

from doge_deploy.errors import MissingDependencyError
from doge_deploy.serve.ray.arguments import Arguments
from doge_deploy.serve.ray.front import Answer, BusyError, Front, NoReplicaError, ReplicaLostError
from doge_deploy.serve.ray.replica import Call, Message, Replica

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

REPLICAS, FRONT = "doge-replica", "doge-front"
"""Names of the deployments."""

FRONT_CPUS = 0.1
_FRONT_REQUESTS = 10_000
"""That a front works on at once; how many wait for a replica is limited by `max_queue`."""


def app(arguments: dict[str, Any]) -> Any:
    """The application, for `serve run doge_deploy.serve.ray:app bundles=...` and `import_path` in a file.

    Args:
        arguments: see `Arguments`.

    Returns:
        `ray.serve.Application`.

    Raises:
        UsageError: an argument is unknown or not legal.
        MissingDependencyError: Ray Serve is not installed.
    """
    checked = Arguments.of(arguments)
    try:
        from ray import serve
    except ImportError:
        raise MissingDependencyError(
            "Ray Serve is not installed: pip install 'doge-deploy[cpu,ray]' on every node"
        ) from None
    replicas = serve.deployment(
        ReplicaDeployment,
        name=REPLICAS,
        **_number(checked),
        ray_actor_options={"num_cpus": checked.threads, "num_gpus": checked.gpus},
        max_ongoing_requests=checked.ongoing,
        max_queued_requests=checked.max_queue,
        graceful_shutdown_timeout_s=checked.drain_seconds,
        graceful_shutdown_wait_loop_s=min(1.0, max(checked.drain_seconds, 0.1)),
        health_check_period_s=checked.health_seconds,
        request_router_config={"initial_backoff_s": 0.01, "max_backoff_s": 0.05},
    )
    front = serve.deployment(
        serve.ingress()(FrontDeployment),
        name=FRONT,
        num_replicas=checked.fronts,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        max_ongoing_requests=_FRONT_REQUESTS,
        graceful_shutdown_timeout_s=checked.drain_seconds + 5,
    )
    return front.bind(checked, replicas.bind(checked))


def _number(arguments: Arguments) -> dict[str, Any]:
    if arguments.replicas is not None:
        return {"num_replicas": arguments.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_ongoing or arguments.slots,
            "upscale_delay_s": arguments.upscale_delay_seconds,
            "downscale_delay_s": arguments.downscale_delay_seconds,
        }
    }


class ReplicaDeployment:
    """What Ray calls a replica of: one server."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]  # Ray awaits it
        from doge_deploy.serve.logs import configure

        configure("json")
        self._replica = Replica()
        await self._replica.open(arguments)
        self._metrics = _Published()

    async def answer(self, call: Call) -> AsyncIterator[list[Message]]:
        """See `Replica.answer`."""
        if self._replica.end_if_failed():
            await asyncio.Event().wait()  # the process ends, and another replica gets the request
        async for messages in self._replica.answer(call):
            yield messages

    def check_health(self) -> None:
        """Ray asks this now and then, and replaces a replica that does not answer."""
        self._replica.end_if_failed()
        self._metrics.publish(self._replica.samples())

    async def __del__(self) -> None:  # Ray awaits it, when the time to drain is over
        await self._replica.close()


class _Published:
    """A replica's metrics among Ray's, which names the replica in each."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def publish(self, samples: Iterable[Sample]) -> None:
        """What counts and what is in buckets comes as it is at the moment: to Prometheus a number is a number."""
        from ray.serve.metrics import Gauge

        for sample in samples:
            if sample.name not in self._gauges:
                self._gauges[sample.name] = Gauge(sample.name, "see docs/serve.md", tag_keys=tuple(sample.labels))
            self._gauges[sample.name].set(sample.value, tags=dict(sample.labels))


class FrontDeployment:
    """What Ray's proxy calls."""

    def __init__(self, arguments: Arguments, replicas: Any) -> None:
        from doge_deploy.serve.logs import configure

        configure("json")
        self._arguments = arguments
        self._replicas = replicas.options(method_name="answer", stream=True)

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Ray's ingress runs."""
        from doge_deploy.serve.http.security import Gate, read_keys

        file = self._arguments.api_key_file
        front = Front(lambda call: _Streamed(self._replicas.remote(call)))
        return Gate(front, read_keys(file) if file is not None else ())


class _Streamed(Answer):
    """What a replica sends, with Ray's errors as ours."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages

    async def next(self) -> list[Message] | None:
        from ray import exceptions
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        try:
            found: list[Message] = await anext(self._messages)
        except StopAsyncIteration:
            return None
        except BackPressureError as error:
            raise BusyError(_first_line(error)) from error
        except DeploymentUnavailableError as error:
            raise NoReplicaError(_first_line(error)) from error
        except (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.ObjectLostError) as error:
            raise ReplicaLostError(_first_line(error)) from error
        return found

    def cancel(self) -> None:
        with contextlib.suppress(Exception):  # of what has ended meanwhile
            self._messages.cancel()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

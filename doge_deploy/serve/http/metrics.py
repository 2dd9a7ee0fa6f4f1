"""Prometheus metrics, under the names that dashboards of other servers use, with the prefix `doge_`.

Reference: https://docs.vllm.ai/en/latest/usage/metrics.html (the names).
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from doge_deploy.serve.http.embeddings import FeatureModel
from doge_deploy.serve.request import FinishReason
from doge_deploy.serve.scheduler import Scheduler

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper ends of the buckets of every histogram; the last bucket has none."""


class Histogram:
    """Times in seconds, counted in one thread.

    The library's own takes two locks and a search for each number, as long as all else that is done for a token of a
    stream; it is the reference of the tests.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper end of each bucket, and how many times are at most that."""
        return list(zip(map(floatToGoString, (*SECONDS, float("inf"))), accumulate(self.counts), strict=True))


class Times:
    """Histograms of one model."""

    def __init__(self) -> None:
        self.first_token, self.inter_token, self.latency, self.queue_time = (Histogram() for _ in range(4))


class Metrics:
    """All that is measured, of all models; a label says of which."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._states = _States()
        self.registry.register(self._states)

    def of(self, model: str) -> Times:
        """The histograms of a model."""
        return self._states.times.setdefault(model, Times())

    def watch(self, model: str, scheduler: Scheduler) -> None:
        """Show the state of a scheduler; it is read when somebody asks."""
        self._states.schedulers[model] = scheduler

    def watch_features(self, model: str, features: FeatureModel) -> None:
        """The same of a model for embeddings, which has one request in work and no slots."""
        self._states.features[model] = features


class _States(Collector):
    """What the schedulers know themselves, read at the time of a scrape. Another thread changes it meanwhile: single
    numbers and copies of lists are read, which Python does at once.
    """

    def __init__(self) -> None:
        self.schedulers: dict[str, Scheduler] = {}
        self.features: dict[str, FeatureModel] = {}
        self.times: dict[str, Times] = {}

    def collect(self) -> list[Metric]:
        """Gauges, counters and histograms, by model."""
        return [*self._gauges(), *self._counters(), *self._histograms()]

    def _histograms(self) -> list[Metric]:
        def family(name: str, text: str, found: dict[str, Histogram]) -> Metric:
            metric = HistogramMetricFamily(f"doge_{name}_seconds", text, labels=["model_name"])
            for model, times in found.items():
                metric.add_metric([model], times.buckets(), times.sum)
            return metric

        every = self.times.items()
        first = {model: times.first_token for model, times in every}
        inter = {model: times.inter_token for model, times in every}
        whole = {model: times.latency for model, times in every}
        queue = {model: times.queue_time for model, times in every}
        return [
            family("time_to_first_token", "From the arrival of a request to its first token.", first),
            family("inter_token_latency", "Between two tokens of a request.", inter),
            family("e2e_request_latency", "From the arrival of a request to its end.", whole),
            family("request_queue_time", "From the arrival of a request to its slot.", queue),
        ]

    def _gauges(self) -> list[Metric]:
        texts = {
            "num_requests_running": "Requests that have a slot, or whose texts are embedded.",
            "num_requests_waiting": "Requests in the queue.",
            "num_slots": "Slots of the cache.",
            "kv_cache_usage_perc": "Share of the cache that requests in flight use, 0 to 1.",
        }
        families = {
            name: GaugeMetricFamily(f"doge_{name}", text, labels=["model_name"]) for name, text in texts.items()
        }
        for model, scheduler in self.schedulers.items():
            values = {
                "num_requests_running": scheduler.running,
                "num_requests_waiting": len(scheduler.waiting),
                "num_slots": scheduler.runner.slots,
                "kv_cache_usage_perc": scheduler.cache_usage,
            }
            for name, value in values.items():
                families[name].add_metric([model], value)
        slots = GaugeMetricFamily(
            "doge_slot_tokens",
            "Tokens that a slot holds, of a request (busy) or kept for their prefix.",
            labels=["model_name", "slot", "busy"],
        )
        for model, scheduler in self.schedulers.items():
            for held in scheduler.table.all():
                slots.add_metric([model, str(held.slot), str(held.busy).lower()], len(held.tokens))
        for model, features in self.features.items():
            unfinished = features.waiting
            families["num_requests_running"].add_metric([model], min(unfinished, 1))
            families["num_requests_waiting"].add_metric([model], max(unfinished - 1, 0))
        return [*families.values(), slots]

    def _counters(self) -> list[Metric]:
        texts = {
            "prompt_tokens": "Prompt tokens that were computed.",
            "generation_tokens": "Tokens that were generated.",
            "prefix_cache_queries": "Prompt tokens that were looked for in the slots.",
            "prefix_cache_hits": "Prompt tokens that were found there and not computed again.",
            "spec_draft_tokens": "Tokens that speculation proposed.",
            "spec_accepted_tokens": "Proposed tokens that were accepted.",
        }
        families = {
            name: CounterMetricFamily(f"doge_{name}", text, labels=["model_name"]) for name, text in texts.items()
        }
        finished = CounterMetricFamily(
            "doge_request_success", "Requests that ended, by reason.", labels=["model_name", "finished_reason"]
        )
        for model, scheduler in self.schedulers.items():
            counters = scheduler.counters
            values = {
                "prompt_tokens": counters.prompt_tokens,
                "generation_tokens": counters.generated_tokens,
                "prefix_cache_queries": counters.prefix_queries,
                "prefix_cache_hits": counters.prefix_hits,
                "spec_draft_tokens": counters.draft_tokens,
                "spec_accepted_tokens": counters.accepted_tokens,
            }
            for name, value in values.items():
                families[name].add_metric([model], value)
            for reason in get_args(FinishReason):  # also where it is 0: an alarm looks whether it has grown
                finished.add_metric([model, reason], counters.finished.get(reason, 0))
        for model, features in self.features.items():
            families["prompt_tokens"].add_metric([model], features.tokens)
        return [*families.values(), finished]

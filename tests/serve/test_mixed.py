"""Everything at once, on two bundles for text and one for embeddings: each gets what it gets alone; nothing is left."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import Running, of_bundle, running

from doge_deploy.serve.scheduler import Limits

LENGTH = 512
"""Tokens that a slot of the bundles holds."""

Asked = dict[str, Any]


def odd_requests(draw: random.Random) -> list[Asked]:
    """Legal bodies for `/v1/completions`, greedy, none of them usual."""
    head = [[start, *range(start, start + 60)] for start in (20, 120)]  # what prompts share
    bodies: list[Asked] = [
        {"prompt": [70] * LENGTH, "max_tokens": 5},
        {"prompt": [71] * (LENGTH - 3), "max_tokens": 99},
        {"prompt": [head[0], head[0][:40], head[1]], "n": 2, "max_tokens": 1},
        {"prompt": head[1], "n": 4, "max_tokens": 12},
    ]
    for _ in range(20):
        prompt = draw.choice(head)[: draw.randint(1, 61)] + [draw.randrange(20, 900) for _ in range(draw.randint(0, 3))]
        bodies.append({"prompt": prompt, "max_tokens": draw.choice([1, 2, 30]), "n": draw.choice([1, 1, 2])})
        if draw.random() < 0.4:
            bodies[-1]["stop"] = draw.choice([" ", "e", "the", ["a", "\n"]])
    return [{"temperature": 0, **body} for body in bodies]


def texts(answer: Any) -> list[tuple[str, str]]:
    return [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]


def leave(server: Running, body: Asked, lines: int) -> None:
    """Read so many lines of the stream, and go."""
    with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        for _, _ in zip(range(lines), response.iter_lines(), strict=False):
            pass


@pytest.mark.parametrize("slots", [1, 3])
def test_each_gets_what_it_gets_alone_and_nothing_is_left(
    slots: int, tiny_bundle_last: Path, tiny_bundle_all: Path, features_bundle: Path
) -> None:
    draw, names = random.Random(slots), ("last", "all", "features")
    limits = Limits(step_tokens=32, alone_tokens=64, together_tokens=48)
    bundles = (tiny_bundle_last, tiny_bundle_all, features_bundle)
    with (
        running(of_bundle(*bundles, names=names, slots=slots, limits=limits)) as server,
        ThreadPoolExecutor(12) as pool,
    ):
        bodies = [{"model": name, **body} for name in names[:2] for body in odd_requests(draw)]
        alone = [texts(server.complete(**body)) for body in bodies]
        vector = server.post("/v1/embeddings", input="x = 1", model="features")["data"]
        draw.shuffle(order := list(range(len(bodies))))
        jobs, left = {}, []
        for place in order:
            jobs[place] = pool.submit(server.complete, **bodies[place])
            if draw.random() < 0.5:
                asked = {**draw.choice(bodies), "max_tokens": 200}
                left.append(pool.submit(leave, server, asked, draw.choice([0, 1, 1, 5])))
            embedded = pool.submit(server.post, "/v1/embeddings", input=["x = 1"] * 3, model="features")
        found = [texts(jobs[place].result()) for place in range(len(bodies))]
        assert [row["embedding"] for row in embedded.result()["data"]] == 3 * [vector[0]["embedding"]]
        for one in left:
            one.result()
        served, schedulers = server.served, [model.engine.scheduler for model in server.served.texts.values()]
        server.wait_until(server.at_rest)
        assert found == alone
        assert not served.arrivals.coming and not any(inbox.waiting for inbox in served.inboxes.values())
        for scheduler in schedulers:
            assert scheduler.table.busy == scheduler.waiting_tokens == 0 and not scheduler._ngrams
            assert scheduler.counters.finished["cancelled"] > 0 and "error" not in scheduler.counters.finished
            lengths = [scheduler.runner.length(held.slot) for held in scheduler.table.all()]  # type: ignore[attr-defined]
            assert lengths == [len(held.tokens) for held in scheduler.table.all()]

"""Two replicas in a local cluster of Ray, one of which is killed under load:  nox -s ray

python tests/ray/cluster.py BUNDLE [--rounds N]    with `doge-deploy[cpu,ray]` and httpx; BUNDLE is one of doge-tiny

Every answer is compared with that of `generate`. Figures are printed; what must hold is asserted. Throughput is
measured with 1 and 2 replicas in turns, --rounds times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import httpx
import ray
from free_ports import free_ports
from ray import serve

import doge_deploy
from doge_deploy.serve.ray import app, application
from doge_deploy.serve.ray.replica import Call, Message
from doge_deploy.serve.scheduler import Scheduler

CLIENTS = 12
TOKENS = 300
SURE = 55
"""Tokens of an answer that do not depend on its neighbours: beyond the window of 64 keys rounding decides among keys of
equal scores, which a text that repeats itself has."""
ON = {"1": -100, "5": -100}
"""Biases that keep a text from ending."""
PROMPTS = [f"The {word} statement" for word in "if for while with import return class try def del pass raise".split()]
SLOTS = 4
HEALTH_SECONDS = 1.0


@dataclass
class Sent:
    """A request and what became of it."""

    prompt: str
    stream: bool
    start: float
    end: float = 0.0
    status: int = 0
    text: str = ""
    error: str | None = None
    """The code of an error event or object, or what the client raised."""
    tokens_before_error: int = 0
    done: bool = False
    """The stream ended as streams end."""


def body(prompt: str, stream: bool) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logit_bias": ON,
        "stream": stream,
    }


def send(client: httpx.Client, prompt: str, stream: bool) -> Sent:
    sent = Sent(prompt, stream, time.monotonic())
    try:
        if stream:
            with client.stream("POST", "/v1/completions", json=body(prompt, True)) as answer:
                sent.status = answer.status_code
                read_stream(answer, sent)
        else:
            answer = client.post("/v1/completions", json=body(prompt, False))
            sent.status = answer.status_code
            found = answer.json()
            sent.error = found["error"]["code"] or found["error"]["message"] if "error" in found else None
            sent.text = "" if sent.error else found["choices"][0]["text"]
            sent.done = bool(sent.error) or found["usage"]["completion_tokens"] == TOKENS
    except (httpx.HTTPError, ValueError) as error:
        sent.error = f"{type(error).__name__}: {error}"
    sent.end = time.monotonic()
    return sent


def read_stream(answer: httpx.Response, sent: Sent) -> None:
    if answer.status_code != 200:
        answer.read()
        sent.error = answer.json()["error"]["code"]
        return
    for line in answer.iter_lines():
        if line == "data: [DONE]":
            sent.done = True
        elif line.startswith("data: "):
            found = json.loads(line.removeprefix("data: "))
            if "error" in found:
                sent.error = found["error"]["code"] or found["error"]["message"]
            else:
                sent.text += found["choices"][0]["text"]
                sent.tokens_before_error += 1


@dataclass
class Load:
    """Clients that ask again and again, streams and whole answers in turns."""

    address: str
    sent: list[Sent] = field(default_factory=list)

    @contextmanager
    def on(self, clients: int = CLIENTS) -> Iterator[None]:
        stop = threading.Event()
        numbers = itertools.count()

        def ask() -> None:
            with httpx.Client(base_url=self.address, timeout=120) as client:
                while not stop.is_set():
                    number = next(numbers)
                    self.sent.append(send(client, PROMPTS[number % len(PROMPTS)], number % 2 == 0))

        with ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(ask) for _ in range(clients)]
            try:
                yield
            finally:
                stop.set()
            for one in asking:
                one.result()


def expected_texts(bundle: Path) -> dict[str, str]:
    """The first `SURE` tokens of what `generate` makes of each prompt."""
    biases = {int(token): bias for token, bias in ON.items()}
    choices: dict[str, Any] = {"do_sample": False, "max_new_tokens": SURE, "logit_bias": biases}
    with doge_deploy.load(bundle, threads=1, defaults=choices) as model:
        return {prompt: model.generate(prompt).text for prompt in PROMPTS}


def replica_processes() -> dict[int, float]:
    """Processes of replicas that are descendants of this one, with the seconds of processor time that they took."""
    parents, names, times = {}, {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()
                names[int(folder.name)] = (folder / "cmdline").read_text()
            except OSError:
                continue
            parents[int(folder.name)] = int(state[1])
            times[int(folder.name)] = (int(state[11]) + int(state[12])) / os.sysconf("SC_CLK_TCK")

    def mine(process: int) -> bool:
        while process in parents:
            if process == os.getpid():
                return True
            process = parents[process]
        return False

    return {one: times[one] for one, name in names.items() if "doge-replica" in name and mine(one)}


def wait(until: Callable[[], bool], what: str, seconds: float = 300) -> float:
    start = time.monotonic()
    while not until():
        assert time.monotonic() < start + seconds, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - start


def running_replicas() -> int:
    states = serve.status().applications["default"].deployments["doge-replica"].replica_states
    return sum(count for state, count in states.items() if getattr(state, "value", state) == "RUNNING")


def deploy(bundle: Path, replicas: int, **more: Any) -> None:
    number = {} if "max_replicas" in more else {"replicas": replicas}
    serve.run(app({"bundles": [str(bundle)], "slots": SLOTS, "health_seconds": HEALTH_SECONDS, **number, **more}))
    wait(lambda: running_replicas() == replicas and len(replica_processes()) == replicas, f"{replicas} replicas")


def both_work(before: dict[int, float], seconds: float = 2.0) -> dict[int, float]:
    """Wait until two replicas have taken so much processor time since `before`, each at least a tenth of it."""
    spent: dict[int, float] = {}

    def do() -> bool:
        now = replica_processes()
        spent.clear()
        spent.update({process: taken - before.get(process, 0) for process, taken in now.items()})
        total = sum(spent.values())
        return len(spent) == 2 and total > seconds and min(spent.values()) > 0.1 * total

    wait(do, "both replicas work", 60)
    return spent


def check_texts(sent: list[Sent], expected: dict[str, str]) -> int:
    """How many answers came whole; each begins as the prompt's answer does alone."""
    whole = [one for one in sent if one.error is None]
    for one in whole:
        assert one.done and one.status == 200, one
        assert one.text.startswith(expected[one.prompt]) and len(one.text) > 2 * SURE, one
    return len(whole)


def killed_under_load(address: str, bundle: Path, expected: dict[str, str]) -> None:
    before = replica_processes()
    load = Load(address)
    with load.on():
        spent = both_work(before)
        victim = max(before)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        wait(lambda: victim not in replica_processes(), "the process ends")
        wait(lambda: running_replicas() == 2 and len(replica_processes()) == 2, "two replicas again")
        back = time.monotonic() - killed
        wait(lambda: sum(one.start > killed for one in load.sent) > CLIENTS, "later requests")
    lost = [one for one in load.sent if one.error is not None]
    for one in lost:
        assert one.stream and one.error == "replica_lost" and one.done and one.tokens_before_error > 0, one
        assert one.start < killed < one.end, f"a request failed that was not running when the replica died: {one}"
        assert one.text.startswith(expected[one.prompt]) or expected[one.prompt].startswith(one.text), one
    caught = [one for one in load.sent if one.start < killed < one.end]
    later = [one for one in load.sent if one.start > killed]
    whole = check_texts(load.sent, expected)
    assert len(lost) <= SLOTS + 2, "more than the replica can have had"
    assert len(later) > CLIENTS and whole + len(lost) == len(load.sent)
    share = {process: round(seconds, 1) for process, seconds in spent.items()}
    print(f"processor time of the replicas before: {share}")
    print(
        f"killed: {len(load.sent)} requests in all, {len(caught)} running at that moment, of them {len(lost)} streams "
        f"lost with an error event, {len(caught) - len(lost)} finished or begun again; {len(later)} later ones, none "
        f"failed; two replicas again after {back:.1f} s"
    )


BREAK = "End this engine."
BREAK_TOKENS = TOKENS + 1
"""By this length the engine knows the request. It must be the one that ends the engine: one that only finds it ended is
given to the other replica, and would end that too.
"""


class Breakable(application.ReplicaDeployment):
    """A replica whose engine a request can end."""

    async def answer(self, call: Call) -> AsyncIterator[list[Message]]:
        if BREAK.encode() in call.body:
            for model in self._replica._served.texts.values():
                _break(model.engine._scheduler)
        async for messages in super().answer(call):
            yield messages


def _break(scheduler: Scheduler) -> None:
    prefill = scheduler._prefill

    def breaking() -> None:
        if any(request.max_new_tokens == BREAK_TOKENS for request in scheduler.prefilling):
            raise ZeroDivisionError
        prefill()

    scheduler._prefill = breaking  # type: ignore[method-assign]


def engine_ended_under_load(address: str, bundle: Path, expected: dict[str, str]) -> None:
    """What it had fails, and nothing else: a replica that only refuses would get most of the requests that follow."""
    before = set(replica_processes())
    load = Load(address)
    with load.on():
        time.sleep(2)
        broken = time.monotonic()
        answer = httpx.post(
            f"{address}/v1/completions", json=body(BREAK, False) | {"max_tokens": BREAK_TOKENS}, timeout=60
        )
        ended = time.monotonic()
        assert answer.status_code == 500 and "the engine failed" in answer.text, answer.text
        wait(lambda: len(before & set(replica_processes())) == 1, "the process ends")
        wait(lambda: running_replicas() == 2 and len(replica_processes()) == 2, "two replicas again")
        back = time.monotonic() - broken
        wait(lambda: any(one.start > ended for one in load.sent), "later requests")
    lost = [one for one in load.sent if one.error is not None]
    for one in lost:
        assert one.error is not None and "the engine failed" in one.error, one
    later = [one for one in load.sent if one.start > ended]
    assert len(lost) <= SLOTS + 2, "more than the replica can have had"
    assert later and check_texts(load.sent, expected) + len(lost) == len(load.sent)
    assert not [one for one in later if one in lost], "a request failed that came when the engine had ended"
    print(
        f"an engine ended: {len(lost)} requests that it had failed, none of {len(later)} later ones; two replicas "
        f"again after {back:.1f} s"
    )


def scaled_down_under_load(address: str, bundle: Path, expected: dict[str, str]) -> None:
    """A replica that is taken away finishes what it has."""
    load = Load(address)
    with load.on():
        wait(lambda: len(load.sent) > CLIENTS, "requests")
        deploy(bundle, 1)
        scaled = len(load.sent)
        wait(lambda: len(load.sent) > scaled + CLIENTS, "later requests")
    assert check_texts(load.sent, expected) == len(load.sent), [one for one in load.sent if one.error]
    print(f"scaled from 2 to 1 replicas under load: {len(load.sent)} requests, none failed")


def scaled_by_load(address: str, bundle: Path, expected: dict[str, str]) -> None:
    """One replica becomes two while there is more to do than it should have, and one again when there is not."""
    limits = {"min_replicas": 1, "max_replicas": 2, "target_ongoing": 2}
    delays = {"upscale_delay_seconds": 1.0, "downscale_delay_seconds": 2.0}
    deploy(bundle, 1, **limits, **delays)
    load = Load(address)
    with load.on():
        more = wait(lambda: running_replicas() == 2, "a second replica")
        both_work(replica_processes())
    light = Load(address)
    with light.on(1):
        fewer = wait(lambda: running_replicas() == 1 and len(replica_processes()) == 1, "one replica again")
        time.sleep(1)
    sent = [*load.sent, *light.sent]
    assert check_texts(sent, expected) == len(sent), [one for one in sent if one.error]
    print(
        f"a second replica {more:.1f} s after {CLIENTS} clients came, none but the first {fewer:.1f} s after all but"
        f" one had gone: {len(sent)} requests, none failed"
    )


def throughput(address: str, seconds: float) -> float:
    """Tokens a second."""
    load = Load(address)
    with load.on():
        time.sleep(0.5)
        start = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
    return sum(TOKENS * overlap(one, start, end) for one in load.sent) / (end - start)


def overlap(one: Sent, start: float, end: float) -> float:
    """Share of a request's time that lies within the measured time."""
    return max(0.0, min(one.end, end) - max(one.start, start)) / (one.end - one.start)


def one_against_two(address: str, bundle: Path, rounds: int, seconds: float) -> None:
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for replicas in (1, 2):
            deploy(bundle, replicas)
            found[replicas].append(throughput(address, seconds))
    ratios = [two / one for one, two in zip(found[1], found[2], strict=True)]
    print(
        f"throughput with {CLIENTS} clients: {statistics.median(found[1]):.0f} tokens/s of 1 replica, "
        f"{statistics.median(found[2]):.0f} of 2; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {rounds} rounds)"
    )


def busy_is_429(address: str, bundle: Path, expected: dict[str, str]) -> None:
    deploy(bundle, 1, slots=1, max_queue=3)
    with ThreadPoolExecutor(40) as pool, httpx.Client(base_url=address, timeout=120) as client:
        answers = list(
            pool.map(lambda n: client.post("/v1/completions", json=body(PROMPTS[n % len(PROMPTS)], False)), range(40))
        )
    for number, answer in enumerate(answers):
        if answer.status_code == 429:
            assert answer.headers["retry-after"] and answer.json()["error"]["code"] == "queue_full", answer.text
        else:
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"].startswith(expected[PROMPTS[number % len(PROMPTS)]])
    counts = Counter(answer.status_code for answer in answers)
    assert counts[429] and counts[200] >= 3
    print(f"40 requests at once for 1 slot and a queue of 3: {dict(counts)}")


def clients_that_leave(address: str) -> None:
    """Their requests are cancelled in the replica; and what a replica counts is among Ray's metrics."""
    with httpx.Client(base_url=address, timeout=60) as client:
        for prompt in PROMPTS:
            with client.stream("POST", "/v1/completions", json=body(prompt, True)) as answer:
                next(answer.iter_lines())
    port = ray.nodes()[0]["MetricsExportPort"]

    def cancelled() -> bool:
        text = httpx.get(f"http://{ray.nodes()[0]['NodeManagerAddress']}:{port}/metrics", timeout=10).text
        lines = [line for line in text.splitlines() if re.match(r"ray_doge_request_success_total{.*cancelled", line)]
        assert all('replica="' in line and 'deployment="doge-replica"' in line for line in lines), lines
        return sum(float(line.rpartition(" ")[2]) for line in lines) >= len(PROMPTS) / 2

    seconds = wait(cancelled, "cancelled requests in Ray's metrics", 120)
    print(f"{len(PROMPTS)} clients left after the first token: cancelled, seen in Ray's metrics after {seconds:.0f} s")


def whole_interface(address: str) -> None:
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "doge-tiny"
        assert client.get("/metrics").status_code == 404
        answer = client.post("/v1/completions", json={"prompt": 5})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
        answer = client.get("/health", headers={"X-Request-Id": "mine"})
        assert answer.headers.get_list("x-request-id") == ["mine"], answer.headers
        assert re.search("<title>", client.get("/").text)
        chat = {"messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 5, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=chat) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert stream.headers["content-type"].startswith("text/event-stream") and lines[-1] == "data: [DONE]"


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement of throughput")
    parser.add_argument("--only-throughput", action="store_true")
    asked = parser.parse_args()
    bundle = asked.bundle.resolve()
    begun = time.monotonic()
    expected = expected_texts(bundle)
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    # CPUs are only counted: a machine of 2 has the controller and the proxy beside two replicas
    # Ray refuses a folder inside of the environment, where nox puts TMPDIR; the paths of its sockets must be short
    folder = tempfile.mkdtemp(prefix="doge-ray-", dir="/tmp")
    ray.init(
        num_cpus=6, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, _temp_dir=folder
    )
    application.ReplicaDeployment = Breakable  # type: ignore[misc]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        deploy(bundle, 2)
        print(f"2 replicas after {time.monotonic() - begun:.0f} s")
        if not asked.only_throughput:
            whole_interface(address)
            killed_under_load(address, bundle, expected)
            engine_ended_under_load(address, bundle, expected)
            clients_that_leave(address)
            scaled_down_under_load(address, bundle, expected)
            scaled_by_load(address, bundle, expected)
        one_against_two(address, bundle, asked.rounds, asked.seconds)
        if not asked.only_throughput:
            busy_is_429(address, bundle, expected)
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"all of it took {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()

"""The scheduler and its thread without HTTP: what a server could do at most.

python alone.py BUNDLE      lines of `clients answers seed` on standard input

The driver does what the clients of `load.py` do, in the process of the engine: it asks again as soon as an answer has
ended. Texts are made from tokens here too, by the same code, and thrown away.
"""

from __future__ import annotations

import queue
import random
import sys
import time
from pathlib import Path

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.options.generation import GenerationOptions
from doge_deploy.serve.model import Answering, ServedText
from doge_deploy.serve.request import Event, Finished, Produced, Request
from doge_deploy.serve.start import ServeOptions, open_text


class Driver:
    """Clients of one engine, in this process."""

    def __init__(self, bundle: Path, options: ServeOptions) -> None:
        self._events: queue.SimpleQueue[list[tuple[str, Event]]] = queue.SimpleQueue()
        self._model: ServedText = open_text(open_bundle(bundle), "alone", options, self._events.put)
        self._model.engine.start()
        self._count = 0

    def close(self) -> None:
        """End the engine's thread."""
        self._model.engine.stop(10)

    def run(self, clients: int, answers: int, *, prompt: int = 64, new: int = 64, seed: int = 0) -> float:
        """Tokens a second of `clients` at once that take `answers` answers each."""
        words = random.Random(seed)
        left = {}
        tokens, start = 0, time.perf_counter()
        for _ in range(clients):
            left[self._submit(words, prompt, new)] = answers - 1
        while left:
            for name, event in self._events.get():
                tokens += isinstance(event, Produced)
                if isinstance(event, Finished) and (more := left.pop(name)):
                    left[self._submit(words, prompt, new)] = more - 1
        return tokens / (time.perf_counter() - start)

    def _submit(self, words: random.Random, prompt: int, new: int) -> str:
        self._count += 1
        ids = [words.randrange(3, 32000) for _ in range(prompt)]
        answering = Answering(GenerationOptions(max_new_tokens=new))
        request: Request = self._model.request(f"r{self._count}", ids, answering)
        self._model.engine.submit(request)
        return request.id


def main() -> None:
    """Take lines of `clients answers seed` from standard input; answer each with tokens a second."""
    driver = Driver(Path(sys.argv[1]), ServeOptions(slots=16, speculate=False))
    for line in sys.stdin:
        clients, answers, seed = map(int, line.split())
        print(driver.run(clients, answers, seed=seed), flush=True)
    driver.close()


if __name__ == "__main__":
    main()

"""Runs of the reference made ahead of the judge, in processes of one thread each.

A reference with two threads is not twice as fast as with one, and steps of one token hardly faster at all; two runs
beside each other use both cores. The processes are forks: they have the reference's weights already, and share them.
What they do not deliver, for whatever reason, the judge runs itself.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from doge_deploy.devices.host import available_cpus, available_memory

MOST_WORKERS = 4
"""More would wait for memory, which they share."""


def workers_for(run_bytes: int) -> int:
    """How many runs at once this machine has processors and memory for: 0 or at least 2.

    Args:
        run_bytes: the most that one of them takes, beside the weights.
    """
    if sys.platform != "linux":  # elsewhere a fork of a process with threads is not safe
        return 0
    memory = available_memory()
    room = MOST_WORKERS if memory is None else memory // 2 // max(run_bytes, 1)
    workers = min(MOST_WORKERS, available_cpus(), room)
    return workers if workers > 1 else 0


class Ahead:
    """Results of tasks by key, each made once and taken once.

    Args:
        tasks: in the order in which they are begun.
        workers: processes.
    """

    def __init__(self, tasks: Mapping[Hashable, Callable[[], Any]], workers: int) -> None:
        self._numbers = {key: number for number, key in enumerate(tasks)}
        self._folder = tempfile.TemporaryDirectory(prefix="doge-deploy-verify-")
        self._done: set[int] = set()
        context = multiprocessing.get_context("fork")
        following = context.Value("q", 0)
        self._processes, self._pipes = [], []
        for _ in range(min(workers, len(tasks))):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (list(tasks.values()), following, Path(self._folder.name), sender)
            process = context.Process(target=_work, args=arguments, daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 warns of forks beside threads: the child starts none and uses none of the parent's
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            sender.close()
            self._processes.append(process)
            self._pipes.append(receiver)

    def take(self, key: Hashable) -> Any:
        """What the task of that key gave, waited for; None where there is no such task, it failed, or it was taken."""
        number = self._numbers.pop(key, None)
        if number is None:
            return None
        while number not in self._done and self._pipes:
            for pipe in wait(self._pipes):
                assert isinstance(pipe, Connection)
                try:
                    self._done.add(pipe.recv())
                except EOFError:  # no more tasks, or it was ended
                    self._pipes.remove(pipe)
        if number not in self._done:
            return None
        file = Path(self._folder.name) / str(number)
        if not file.exists():
            return None
        with file.open("rb") as stored:
            result = pickle.load(stored)
        file.unlink()
        return result

    def close(self) -> None:
        """End the processes, whatever they do, and remove what was not taken."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self._folder.cleanup()


def _work(tasks: Sequence[Callable[[], Any]], following: Any, folder: Path, pipe: Connection) -> None:
    """The other process: take the next task until there is none; a file for each result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # threads of the parent are not here
    try:
        while True:
            with following.get_lock():
                number = following.value
                following.value += 1
            if number >= len(tasks):
                break
            _deliver(tasks[number], folder / str(number))
            pipe.send(number)
    finally:
        pipe.close()
        os._exit(0)  # nothing of the parent's is closed or written twice


def _deliver(task: Callable[[], Any], file: Path) -> None:
    """No file where it fails: the judge then runs it itself, and says why."""
    try:
        part = file.with_suffix(".part")
        with part.open("wb") as written:
            pickle.dump(task(), written, protocol=5)
        part.rename(file)
    except (Exception, MemoryError):
        return

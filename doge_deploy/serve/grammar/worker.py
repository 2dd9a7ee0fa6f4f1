"""Compiles grammars for a trial, in a process that may end over one; `trial.py` is the other end."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path

from doge_deploy.errors import DogeDeployError
from doge_deploy.process.worker import Channel, connect, error_message
from doge_deploy.serve.grammar.matchers import new_matcher, read_tokenizer

STACK_BYTES = 2 * 2**20
"""A quarter of what the server compiles with, so that what passes here passes there."""

MEMORY_BYTES = 16 * 2**20
"""For a grammar, beyond what the process has with its tokenizer: twice what 4,096 choices take; a schema of 60 kB takes
less than 4 MiB.
"""

_STATM = Path("/proc/self/statm")
"""Of this process in pages; the sixth number is its data."""


def main() -> None:
    """Compile what comes, one object a line, until there is no more."""
    channel = connect()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to every process of a service: the server still drains
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=_work, args=(jobs, channel), daemon=True).start()
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)  # the server is gone, or wants no more: not after a compilation that may take hours


def _work(jobs: queue.SimpleQueue[str], channel: Channel) -> None:
    try:
        file, vocab_size, eos_ids = json.loads(sys.argv[1])
        try:
            tokenizer = read_tokenizer(Path(file), vocab_size, eos_ids)
        except DogeDeployError as error:
            channel.send(error_message(error))
            os._exit(0)
        _limit_memory()
        channel.send({"ready": True})
        while True:
            job = json.loads(jobs.get())
            try:
                new_matcher(tokenizer, job["kind"], job["text"])
                channel.send({"sound": True})
            except DogeDeployError as error:
                channel.send(error_message(error))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _limit_memory() -> None:
    """Only where Linux can; elsewhere time limits what a grammar takes."""
    if sys.platform != "linux":
        return
    import resource

    # what is missing is /proc, or the right to a limit above a lower one
    with contextlib.suppress(OSError, ValueError):
        pages = int(_STATM.read_text(encoding="ascii").split()[5])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        if pages:  # some sandboxes do not say
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))


if __name__ == "__main__":
    main()

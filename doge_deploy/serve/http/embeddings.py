"""Embeddings of a `features` bundle: the mean of the last hidden states of a text's tokens, of length 1.

A Doge is no embedding model; what is served is what its checkpoint gives. Axes: Q tokens of a text, H hidden size.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from doge_deploy.bundle.opening import Bundle
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.runtime.base import Runner
from doge_deploy.serve.engine import EngineStoppedError
from doge_deploy.serve.scheduler import QueueFullError
from doge_deploy.text.lengths import check_length
from doge_deploy.text.tokenizer import Tokenizer


class FeatureModel:
    """A bundle of task features.

    Args:
        name: what clients call it.
        bundle: opened and checked.
        runner: of that bundle; used by one thread, which is this model's own.
        max_waiting: requests that may be in work or wait.
    """

    def __init__(self, name: str, bundle: Bundle, runner: Runner, max_waiting: int = 256) -> None:
        self.name, self.bundle, self.max_waiting = name, bundle, max_waiting
        self.tokenizer = Tokenizer.from_directory(bundle.path, vocab_size=bundle.manifest.facts.vocab_size)
        self.waiting = 0
        """Requests that are in work or wait."""
        self.tokens = 0
        """That were computed since the start."""
        self._stopped = False
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, "doge-embeddings")

    @property
    def max_length(self) -> int:
        """Most tokens of a text."""
        return self.bundle.manifest.max_length

    def encode(self, text: str | Sequence[int]) -> list[int]:
        """Ids of a text that can be embedded. One that cannot fit whatever its tokens are is not encoded.

        Raises:
            UsageError: it is empty, too long, or holds a token that the model has not.
        """
        ids = self.tokenizer.encode(text, room=self.max_length) if isinstance(text, str) else list(text)
        if not ids:
            raise UsageError("the text is empty and the tokenizer has no bos token; give at least one token")
        check_length(len(ids), self.max_length)
        self.tokenizer.check_ids(ids)
        return ids

    async def embed_all(self, texts: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """Of each text `[H]`, one text after the other, so that requests take turns and one can be cancelled.

        Raises:
            QueueFullError: too many requests wait.
            EngineStoppedError: `stop` was called.
            UnsupportedModelError: as `embed`.
        """
        if self.waiting >= self.max_waiting:
            raise QueueFullError(f"{self.waiting} requests for embeddings are waiting, which is the limit")
        self.waiting += 1
        try:
            return [await self._embed_next(ids) for ids in texts]
        finally:
            self.waiting -= 1

    async def _embed_next(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        if self._stopped:
            raise EngineStoppedError("the server is shutting down")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.embed, ids)

    def stop(self) -> None:
        """End requests and the thread when the text in work is done."""
        self._stopped = True
        self._thread.shutdown(wait=False)

    def embed(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """`[H]`, of length 1; for one thread at a time.

        Raises:
            UnsupportedModelError: the model gives what is not finite.
        """
        self._runner.reset(1)
        states = self._runner.run(np.array([ids], np.int64))[0].astype(np.float64)
        self.tokens += len(ids)
        mean = states.mean(axis=0)
        length = float(np.linalg.norm(mean))
        if not np.isfinite(length) or length == 0:
            raise UnsupportedModelError(f"the hidden states of a text of {len(ids)} tokens have no direction")
        vector: npt.NDArray[np.float32] = (mean / length).astype(np.float32)
        return vector


def encoded(vector: npt.NDArray[np.float32], form: str | None) -> list[float] | str:
    """As a list of numbers, or little-endian float32 in base64."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]

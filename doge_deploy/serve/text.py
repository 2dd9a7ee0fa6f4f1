"""From tokens to the text of an answer: incomplete characters and what may be a stop text are withheld."""

from __future__ import annotations

from collections.abc import Sequence

from doge_deploy.runtime.generate import StopStrings
from doge_deploy.text.streams import Detokenizer


class StreamedText:
    """The pieces that come out, joined, are the whole text, whatever tokens it comes in; nothing of a stop text and
    nothing behind one comes out.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._looks = bool(stop)
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """A stop text was found."""
        return self._stop.stopped

    def push(self, token: int) -> str:
        """The text that is certain after `token`."""
        piece = self._detokenizer.push(token)
        if not self._looks:
            return piece
        return self._stop.push(piece, self._detokenizer.special_text(token), self._detokenizer.pending())

    def flush(self) -> str:
        """What was withheld; an incomplete character becomes U+FFFD. To be called once, at the end."""
        return self._stop.push(self._detokenizer.flush()) + self._stop.flush()

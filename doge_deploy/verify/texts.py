"""Text that cases are made of, in a bundle's own tokens."""

from __future__ import annotations

import numpy as np

from doge_deploy.bundle.opening import Bundle
from doge_deploy.runtime.base import IntArray
from doge_deploy.runtime.tokenizer import TOKENIZER_FILE, Tokenizer
from doge_deploy.verify.cases import Limits, repeating_ids

TEXT = (
    "A dynamic mask keeps the keys that matter. Every key carries a score, and the score depends on the key alone, "
    "so the score can be kept beside the key. When there are more keys than the window holds, the keys with the best "
    "scores stay and the other keys are dropped; a key that was dropped never comes back. The window is a promise "
    "about memory, and the score is a promise about attention. Keep the window, keep the score, and keep the promise."
)
"""Natural text with its repetitions, for bundles that have a tokenizer."""


def ids_of(bundle: Bundle, text: str = TEXT) -> IntArray:
    """Natural text `[T]`: through the bundle's tokenizer, or random ids with as many repetitions.

    Raises:
        BrokenBundleError: a file of the tokenizer is broken.
    """
    facts = bundle.manifest.facts
    if TOKENIZER_FILE in bundle.manifest.files:
        ids = Tokenizer.from_directory(bundle.path).encode(text)
        if ids and max(ids) < facts.vocab_size:
            return np.asarray(ids, np.int64)
    return repeating_ids(Limits.of(facts, bundle.manifest.max_length), 256)

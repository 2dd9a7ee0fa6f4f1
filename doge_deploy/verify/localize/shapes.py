"""How many tokens a graph has at a point: it may have left those behind that nobody reads any more."""

from __future__ import annotations

import numpy as np

from doge_deploy.verify.compare import Array
from doge_deploy.verify.localize.calls import CallView

Arrays = dict[str, Array]


def of_last(array: Array, view: CallView) -> Array:
    """Of a state the one token of each row that a head reads."""
    return np.stack([array[b, n][None] for b, n in enumerate(view.last)])


def fitted(values: Arrays, shown: Arrays, view: CallView) -> Arrays:
    """States with as many tokens as the graph has there: after the last selection of tokens it has one per row, and a
    sliding cache has lost the first keys.
    """
    result = {}
    for name, array in values.items():
        count = shown[name].shape[1] if name in shown and shown[name].ndim == 3 else array.shape[1]
        if count == array.shape[1]:
            result[name] = array
        elif count == 1 and not name.endswith(".score"):
            result[name] = of_last(array, view)
        else:
            result[name] = array[:, -count:]
    return result

"""The words that options of an export are made of. Without pydantic, since a bundle is read by them too."""

from __future__ import annotations

import importlib.util
import pkgutil
from typing import Literal

Task = Literal["causal-lm", "sequence-classification", "features"]
CacheLayout = Literal["static", "growing"]
Routing = Literal["reference", "per-token"]
Logits = Literal["last", "all"]

_WEIGHT_FORMATS = "doge_deploy.graph.weight_formats"


def weight_format_names() -> tuple[str, ...]:
    """Names of the weight formats: the modules of their package that do not begin with an underscore.

    They are listed, not imported: what they do belongs to the graph, which options do not know.
    """
    spec = importlib.util.find_spec(_WEIGHT_FORMATS)
    assert spec is not None and spec.submodule_search_locations is not None
    found = (module.name for module in pkgutil.iter_modules(list(spec.submodule_search_locations)))
    return tuple(sorted(name for name in found if not name.startswith("_")))

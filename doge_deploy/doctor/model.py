"""The model that is asked about: a checkpoint or a bundle."""

from __future__ import annotations

from pathlib import Path

from doge_deploy.bundle.files import MANIFEST
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.signature import LAYOUTS
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.errors import UsageError
from doge_deploy.graph.weight_formats import format_of
from doge_deploy.options.compatibility import resolve_max_length
from doge_deploy.targets.deployment import DeployableModel


def open_model(path: str, *, max_length: int | None = None) -> DeployableModel:
    """A bundle's directory, or anything that `export` takes as MODEL; no weights are read.

    Args:
        path: the bundle or model.
        max_length: slots per row, for a checkpoint; its own length where None.

    Raises:
        UsageError, UnsupportedModelError, MissingDependencyError: it cannot be opened.
    """
    if (Path(path) / MANIFEST).is_file():
        manifest = open_bundle(path, check="quick").manifest
        if max_length is not None and max_length != manifest.max_length:
            raise UsageError(
                f"--max-length {max_length}: {path} was exported for {manifest.max_length}; export it again for another"
            )
        return DeployableModel(
            path,
            manifest.facts,
            manifest.options.dtype,
            manifest.max_length,
            tuple(manifest.layouts),
            manifest.last_logits,
            manifest.options.routing,
            format_of(manifest.options),
            manifest.options.inline_functions,
        )
    facts = open_checkpoint(path).facts
    return DeployableModel(path, facts, None, resolve_max_length(facts, max_length), LAYOUTS, True)

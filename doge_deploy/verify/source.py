"""The checkpoint that a bundle came from."""

from __future__ import annotations

from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint import Checkpoint, open_checkpoint
from doge_deploy.errors import UnsupportedModelError, UsageError


def open_reference(bundle: Bundle, reference: str | None) -> Checkpoint:
    """The checkpoint of a bundle, which must have the weights that its manifest names by hash.

    Args:
        bundle: an opened bundle.
        reference: where to find the checkpoint; where None, what the bundle itself says.

    Raises:
        UsageError: the bundle does not say where it came from and no reference was given.
        UnsupportedModelError: the checkpoint is broken, or another one.
    """
    manifest = bundle.manifest
    source = reference or manifest.checkpoint["source"]
    if source is None:
        raise UsageError(
            f"{bundle.path} was exported from a directory; name the checkpoint it came from with --reference MODEL"
        )
    checkpoint = open_checkpoint(source, num_layers=manifest.options.num_layers)
    if checkpoint.sha256 != manifest.checkpoint["sha256"]:
        raise UnsupportedModelError(
            f"{source} is not the checkpoint of {bundle.path}: its weights have sha256 {checkpoint.sha256[:12]}..., "
            f"the bundle's {manifest.checkpoint['sha256'][:12]}..."
        )
    return checkpoint

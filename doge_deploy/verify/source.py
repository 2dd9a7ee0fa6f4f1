"""The checkpoint that a bundle came from."""

from __future__ import annotations

from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint import Checkpoint, open_checkpoint
from doge_deploy.errors import UnsupportedModelError, UsageError


def open_reference(bundle: Bundle, reference: str | None, adapter: str | None = None) -> Checkpoint:
    """The checkpoint of a bundle, which must have the weights that its manifest names by hash.

    Args:
        bundle: an opened bundle.
        reference: where to find the checkpoint; where None, what the bundle itself says.
        adapter: where to find the adapter that was merged into it; where None, what the bundle itself says.

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
    recorded = manifest.checkpoint.get("adapter")
    if recorded is None and adapter is not None:
        raise UsageError(f"--adapter {adapter}: no adapter was merged into {bundle.path}; leave it out")
    if recorded is not None and adapter is None:
        adapter = recorded["source"]
        if adapter is None:
            raise UsageError(
                f"{bundle.path} was merged with an adapter from a directory; name it with --adapter DIRECTORY"
            )
    checkpoint = open_checkpoint(source, num_layers=manifest.options.num_layers, adapter=adapter)
    if checkpoint.sha256 != manifest.checkpoint["sha256"]:
        raise UnsupportedModelError(
            f"{source} is not the checkpoint of {bundle.path}: its weights have sha256 {checkpoint.sha256[:12]}..., "
            f"the bundle's {manifest.checkpoint['sha256'][:12]}..."
        )
    if recorded is not None and checkpoint.adapter is not None and checkpoint.adapter.sha256 != recorded["sha256"]:
        raise UnsupportedModelError(
            f"{adapter} is not the adapter of {bundle.path}: it has sha256 {checkpoint.adapter.sha256[:12]}..., the "
            f"bundle's {recorded['sha256'][:12]}..."
        )
    return checkpoint

"""The weight file of a bundle, read: names and sizes of what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from doge_deploy.bundle.files import WEIGHTS_FILE
from doge_deploy.errors import BrokenBundleError, UnsupportedModelError

if TYPE_CHECKING:
    from doge_deploy.checkpoint.headers import TensorInfo

TRANSPOSED_SUFFIX = ".T"
"""Added to a checkpoint tensor's name where the graph holds its transpose."""


def read_weight_file(bundle: Path) -> dict[str, TensorInfo]:
    """The tensors in the weight file of the bundle at `bundle`, by the names of their initializers; no data is read.

    Raises:
        BrokenBundleError: there is none, or it is not a whole safetensors file.
    """
    from doge_deploy.checkpoint.headers import read_header

    try:
        return read_header(bundle / WEIGHTS_FILE)
    except UnsupportedModelError as error:
        raise BrokenBundleError(str(error)) from error

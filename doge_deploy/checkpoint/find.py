"""Which directory a MODEL argument means."""

from __future__ import annotations

import os
import re
from pathlib import Path

from doge_deploy.errors import MissingDependencyError, UnsupportedModelError, UsageError

BUNDLED_MODELS = ("doge-tiny", "doge-tiny-moe")
"""Names of the checkpoints that come with this package."""

_DEMO = Path(__file__).parent.parent / "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_HUB_FILES = ["*.safetensors", "*.json", "merges.txt", "vocab.txt", "*.model", "chat_template.jinja"]
"""What is downloaded, from the top folder only: never pickled weights, never code."""


def find_checkpoint(model: str) -> Path:
    """The directory of a checkpoint.

    Args:
        model: a bundled name (write `./doge-tiny` for a directory of that name), a directory, or a Hub id
            `owner/name`, which is downloaded unless it is in the local cache.

    Raises:
        UsageError: there is no such directory, or the Hub has no such repository.
        UnsupportedModelError: the Hub's repository is not open to this user.
        MissingDependencyError: the Hub cannot be reached.
    """
    if not model:
        raise UsageError(f"MODEL is empty; {legal_models()}")
    if model in BUNDLED_MODELS:
        return _DEMO / model
    if _is_directory(model):
        return Path(os.path.expanduser(model))
    if os.path.isfile(model):
        raise UsageError(f"{model}: is a file; MODEL must be the directory that holds config.json and the weights")
    if _HUB_ID.fullmatch(model):
        return _download(model)
    raise UsageError(f"{model}: no such directory; {legal_models()}")


def find_adapter(adapter: str) -> Path:
    """The directory of a PEFT adapter: a directory, or a Hub id that is downloaded unless it is in the local cache.

    Raises:
        UsageError: there is no such directory, or it holds no adapter.
        UnsupportedModelError, MissingDependencyError: see `find_checkpoint`.
    """
    if not (adapter and _is_directory(adapter)) and not _HUB_ID.fullmatch(adapter):
        raise UsageError(f"--adapter {adapter}: no such directory; it must be a directory or a Hub id owner/name")
    path = Path(os.path.expanduser(adapter)) if _is_directory(adapter) else _download(adapter)
    if not (path / "adapter_config.json").is_file():
        raise UsageError(f"--adapter {adapter}: has no adapter_config.json: not a PEFT adapter")
    return path


def model_source(model: str) -> str | None:
    """How anyone else may name this model: the bundled name or Hub id, None for a directory."""
    return None if model not in BUNDLED_MODELS and _is_directory(model) else model


def _is_directory(model: str) -> bool:
    # os.path answers False where pathlib raises: a name too long, a user that does not exist
    return os.path.isdir(os.path.expanduser(model))


def legal_models() -> str:
    """What a MODEL argument may be, for the end of a message."""
    return f"MODEL must be a directory, one of {', '.join(BUNDLED_MODELS)}, or a Hub id owner/name"


def _download(model: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingDependencyError(
            f"{model}: no such directory, and the Hub needs huggingface_hub: not installed; {legal_models()}"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise UnsupportedModelError(
            f"{model}: needs access that you lack; ask for it on its page at the Hub, then `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UsageError(f"{model}: neither a directory nor a repository on the Hub; {legal_models()}") from None
    except Exception as error:  # the network fails in the words of whichever library noticed first
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise MissingDependencyError(
            f"{model}: no such directory, and the Hub did not answer ({reason}); {legal_models()}"
        ) from error

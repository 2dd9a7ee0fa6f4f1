"""Python packages that are installed here."""

from __future__ import annotations

from collections.abc import Iterable

from doge_deploy.errors import MissingDependencyError

EXPORT_PACKAGES = ("torch", "transformers", "onnxscript", "onnx", "onnx-ir", "safetensors")
"""What tracing and transformers' models need."""


def require_packages(names: Iterable[str], *, user: str, extra: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        names: as they are called in the package index.
        user: what needs them, for the message: `export`.
        extra: the extra of this package that brings them.

    Raises:
        MissingDependencyError: naming the first one that is absent, and the extra.
    """
    import importlib.metadata  # what runs a bundle asks for nothing here, and does not wait for it

    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise MissingDependencyError(
                f"{user} needs {name}, which is not installed: pip install 'doge-deploy[{extra}]'"
            ) from None


def require_export_packages(user: str) -> None:
    """Raises MissingDependencyError where a package that tracing and transformers' models need is absent."""
    require_packages(EXPORT_PACKAGES, user=user, extra="export")


def require_graph_packages(user: str) -> None:
    """Raises MissingDependencyError where a package that reads and changes ONNX graphs is absent."""
    require_packages(("onnx", "onnx-ir"), user=user, extra="graph")

"""Bundles that the server's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import make_bundle


@pytest.fixture(scope="session")
def tiny_bundle_last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """doge-tiny with the logits of the last token only; do not write into it."""
    return make_bundle("doge-tiny", tmp_path_factory.mktemp("bundles") / "last", logits="last")


@pytest.fixture(scope="session")
def tiny_bundle_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """doge-tiny with the logits of every token; do not write into it."""
    return make_bundle("doge-tiny", tmp_path_factory.mktemp("bundles") / "all", logits="all")


@pytest.fixture(scope="session")
def features_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """doge-tiny without its head; do not write into it."""
    return make_bundle("doge-tiny", tmp_path_factory.mktemp("bundles") / "features", task="features")

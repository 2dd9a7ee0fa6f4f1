"""Bundles that the server's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import shared_bundle


@pytest.fixture(scope="session")
def tiny_bundle_last() -> Path:
    """doge-tiny with the logits of the last token only; do not write into it."""
    return shared_bundle("doge-tiny", logits="last")


@pytest.fixture(scope="session")
def tiny_bundle_all() -> Path:
    """doge-tiny with the logits of every token; do not write into it."""
    return shared_bundle("doge-tiny", logits="all")


@pytest.fixture(scope="session")
def features_bundle() -> Path:
    """doge-tiny without its head; do not write into it."""
    return shared_bundle("doge-tiny", task="features")

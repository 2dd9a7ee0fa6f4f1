"""Packages that a command needs, named with the extra that brings them."""

from __future__ import annotations

import importlib.metadata

import pytest

from doge_deploy.devices.packages import require_export_packages, require_packages
from doge_deploy.errors import MissingDependencyError


def test_what_is_installed_is_enough() -> None:
    require_packages(("numpy", "pydantic"), user="export", extra="export")


@pytest.mark.parametrize("user", ["export", "verify", "bench --against"])
def test_a_missing_package_is_named_with_its_user_and_its_extra(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.metadata.version

    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(MissingDependencyError) as caught:
        require_export_packages(user)
    assert str(caught.value) == (
        f"{user} needs transformers, which is not installed: pip install 'doge-deploy[export]'"
    )
    assert caught.value.exit_code == 4

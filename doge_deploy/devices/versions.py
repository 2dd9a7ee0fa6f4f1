"""Versions of libraries, compared as Python packages are (PEP 440)."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version


def at_least(version: str, first: str) -> bool:
    """Whether `version` is `first` or a later one, a pre-release counted as its release.

    A library's rc, dev and local builds (`1.33rc1`, `1.33.0.dev1`, `1.7.1.116+cu13`) have what the release brings; and
    `10.15` is `10.15.0`. A compute capability such as `8.7` is compared likewise. What is no version at all is never
    late enough.

    Raises:
        packaging.version.InvalidVersion: `first` is no version.
    """
    try:
        found = Version(Version(version).base_version)
    except InvalidVersion:
        return False
    return found >= Version(first)

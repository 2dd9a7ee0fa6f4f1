"""Versions of libraries, compared as Python packages are (PEP 440)."""

from __future__ import annotations


def at_least(version: str, first: str) -> bool:
    """Whether `version` is `first` or a later one, a pre-release counted as its release.

    A library's rc, dev and local builds (`1.33rc1`, `1.33.0.dev1`, `1.7.1.116+cu13`) have what the release brings; and
    `10.15` is `10.15.0`. A compute capability such as `8.7` is compared likewise. What is no version at all is never
    late enough.

    Raises:
        packaging.version.InvalidVersion: `first` is no version.
    """
    if (found := _numbers(version)) and (limit := _numbers(first)):
        return found >= limit
    return _at_least(version, first)


def _numbers(version: str) -> tuple[int, ...]:
    """`1.20.0` as (1, 20), without the zeros that end it; () for what is more than numbers and dots."""
    parts = version.split(".")
    if not all(part.isascii() and part.isdigit() for part in parts):
        return ()
    while len(parts) > 1 and not int(parts[-1]):
        parts.pop()
    return tuple(map(int, parts))


def _at_least(version: str, first: str) -> bool:
    """`at_least` for versions of any kind: the reference implementation."""
    from packaging.version import InvalidVersion, Version  # `generate`, which compares numbers, does not wait for it

    try:
        found = Version(Version(version).base_version)
    except InvalidVersion:
        return False
    return found >= Version(first)

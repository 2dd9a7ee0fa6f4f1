"""What can go wrong, by who can mend it; each class knows the exit code of the command line.

A message is one line that names the culprit, its value and what would be legal.
"""

from __future__ import annotations


class DogeDeployError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code: int = 70
    """1 is `MismatchError`'s alone."""


class MismatchError(DogeDeployError):
    """A bundle ran and computed something other than its reference."""

    exit_code = 1


class UsageError(DogeDeployError):
    """The caller asked for something that does not exist or does not fit: an option, a path, a length."""

    exit_code = 2


class UnsupportedModelError(DogeDeployError):
    """The checkpoint is not a Doge, is damaged, or asks for what cannot be exported exactly."""

    exit_code = 3


class BrokenBundleError(UnsupportedModelError):
    """A bundle is incomplete, altered, or of a format that this version does not read."""


class MissingDependencyError(DogeDeployError):
    """A package, a device or the network is needed and is not there."""

    exit_code = 4

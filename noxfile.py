"""Environments of their own: every supported Python, lint, types.  `nox -l` lists them."""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests", "lint", "typing"]

CONSTRAINTS = "constraints.txt"

# No onnxruntime that runs our bundles exists for Python 3.10: there a checkpoint can be read and checked.
WITHOUT_RUNTIME = [
    "tests/test_config.py",
    "tests/test_options.py",
    "tests/test_checkpoint.py",
    "tests/test_bad_checkpoints.py",
]


def install(session: nox.Session, extras: str) -> None:
    """Install the package itself with `extras`, at the versions that CI tests."""
    session.install("-c", CONSTRAINTS, "-e", f".[{extras}]")


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """All tests that need no special device."""
    install(session, "export,cpu,plugins,dev")
    session.run("pytest", *session.posargs)


@nox.session(python="3.10", name="tests-3.10")
def tests_without_runtime(session: nox.Session) -> None:
    """What Python 3.10 can do."""
    install(session, "export,dev")
    session.run("pytest", *(session.posargs or WITHOUT_RUNTIME))


@nox.session
def lint(session: nox.Session) -> None:
    """Rules and format."""
    session.install("-c", CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Types, strict on the package."""
    install(session, "export,cpu,plugins,dev")
    session.run("mypy", "doge_deploy")

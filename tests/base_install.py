"""What a base installation with one runtime holds, and a Python that can import nothing else."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def canonical(requirement: str) -> str:
    """The name in a requirement, as pip compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[ ;<>=!~\[(]", requirement.strip())[0]).lower()


def installed_with(*requirements: str, without: Sequence[str] = ()) -> set[str]:
    """The distributions that pip installs for `requirements`, apart from what only those in `without` bring."""
    found: set[str] = set()
    waiting = [canonical(requirement) for requirement in requirements]
    while waiting:
        name = waiting.pop()
        if name in found or name in without:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another system
            continue
        found.add(name)
        waiting += [canonical(text) for text in requires if "extra ==" not in text]
    return found


class OnlyThese:
    """Lets the standard library, this package and some distributions be imported, and be found installed."""

    def __init__(self, distributions: set[str]) -> None:
        self._distributions = distributions | {"doge-deploy"}
        self._version = importlib.metadata.version
        self._finders = list(sys.meta_path)
        owners = importlib.metadata.packages_distributions()
        self._modules = {
            module for module, names in owners.items() if any(canonical(name) in self._distributions for name in names)
        }
        self._modules |= {"doge_deploy", "doge_plugins", "__main__", *sys.stdlib_module_names}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """As Python looks for a module, but blind to all others."""
        if name.split(".")[0] not in self._modules and not name.startswith(("__editable__", "_sysconfigdata")):
            return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in self._finders)), None)

    def version(self, name: str) -> str:
        if canonical(name) not in self._distributions:
            raise importlib.metadata.PackageNotFoundError(name)
        return self._version(name)

    def begin(self) -> None:
        """From now on, for the rest of the process."""
        sys.meta_path[:] = [self]
        importlib.metadata.version = self.version


def main(arguments: list[str]) -> None:
    """`base_install.py EXTRA,... ARGUMENTS`: run `doge-deploy ARGUMENTS` with the base and these extras alone.

    Nothing that only the Hub's client brings can be imported: it comes with tokenizers, which needs it to download.
    """
    extras, *command = arguments
    wanted = [*PROJECT["dependencies"]]
    for extra in filter(None, extras.split(",")):
        wanted += PROJECT["optional-dependencies"][extra]
    OnlyThese(installed_with(*wanted, without=["huggingface-hub"])).begin()
    from doge_deploy.cli.main import main as run

    run(command)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a base installation with one runtime holds, and a Python that can import nothing else."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


MISSING = {
    "export": (["export", "doge-tiny", "-o", "x"], "export needs torch, which is not installed", "export"),
    "export with a file": (["export", "doge-tiny", "-o", "x", "--config", "x.yaml"], "PyYAML", "graph"),
    "verify": (["verify", "x"], "verify needs torch, which is not installed", "export"),
    "build": (["build", "x"], "TensorRT-RTX, which is not installed", "rtx"),
    "build --target trt": (["build", "x", "--target", "trt"], "TensorRT, which is not installed", "trt"),
    "bench --plot": (["bench", "x", "--plot", "x.png"], "--plot needs matplotlib", "bench"),
    "doctor --target": (["doctor", "--target", "h100"], "PyYAML", "graph"),
    "plugins check": (["plugins", "check", "x"], "plugins check needs onnx", "graph"),
    "plugins roofline": (
        ["plugins", "roofline", "--model", "20M", "--device", "h100", "--past", "64"],
        "plugins roofline needs onnx",
        "graph",
    ),
    "plugins compile": (["plugins", "compile", "--all"], "triton is not installed", "plugins"),
}
"""Commands that need more, what each says and the extra that it names."""


def canonical(requirement: str) -> str:
    """The name in a requirement, as pip compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[ ;<>=!~\[(]", requirement.strip())[0]).lower()


def requirements_of(*extras: str) -> list[str]:
    """The requirements of extras, those of extras that they name included."""
    found: list[str] = []
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            inner = re.fullmatch(r"doge-deploy\[(\w+)\]", requirement)
            found += requirements_of(inner[1]) if inner else [requirement]
    return found


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

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        """As `importlib.metadata` looks for what is installed."""
        for finder in self._finders:
            for distribution in getattr(finder, "find_distributions", lambda _: ())(context):
                if canonical(distribution.metadata["Name"]) in self._distributions:
                    yield distribution

    def begin(self) -> None:
        """From now on, for the rest of the process."""
        sys.meta_path[:] = [self]


def main(arguments: list[str]) -> None:
    """`base_install.py EXTRA,... ARGUMENTS`: run `doge-deploy ARGUMENTS` with the base and these extras alone.

    Nothing that only the Hub's client brings can be imported: it comes with tokenizers, which needs it to download.
    """
    extras, *command = arguments
    wanted = [*PROJECT["dependencies"], *requirements_of(*filter(None, extras.split(",")))]
    OnlyThese(installed_with(*wanted, without=["huggingface-hub"])).begin()
    from doge_deploy.cli.main import main as run

    run(command)


if __name__ == "__main__":
    main(sys.argv[1:])

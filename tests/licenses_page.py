"""docs/licenses.md, made from the metadata of what is installed.

python tests/licenses_page.py          # writes the page, in the environment of `make setup`
"""

from __future__ import annotations

import re
from collections import deque
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).parent.parent / "docs" / "licenses.md"

EXTRAS = ("", "export", "cpu", "serve", "rtx", "plugins", "bench", "archive")
"""Those that `make setup` installs for users; "" is the base package."""

HEAD = """# Licences of dependencies

doge-deploy has the Apache License 2.0. It contains no code of others; these packages are installed with it. Written by
`python tests/licenses_page.py` from the metadata of each package at the version that is tested, on Linux with Python
3.11; a test fails when this page is stale. *For* names the extras that bring a package, directly or not; packages
without one are in all installations.

The extras `gpu` (onnxruntime-gpu: MIT), `trt` (tensorrt: NVIDIA's own licence) and `ray` (ray: Apache-2.0) are not in
the environment that this page is made in. On other platforms torch may bring further packages, such as NVIDIA's CUDA
libraries.
"""

SHORT = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "apache license 2.0": "Apache-2.0",
    "apache license v2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD",
    "bsd license": "BSD",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "isc license (iscl)": "ISC",
}
"""Names of classifiers and free texts as SPDX calls them, where that is clear."""

BY_HAND = {
    "cuda-bindings": "NVIDIA Software License",
    "tensorrt-rtx-cu13": "NVIDIA's own licence",
    "tensorrt-rtx-cu13-bindings": "NVIDIA's own licence",
    "tensorrt-rtx-cu13-libs": "NVIDIA's own licence",
}
"""Of packages whose metadata only refer to a file."""


def license_of(found: Distribution) -> str:
    """What the metadata say, as shortly as they say it; "" where they say nothing."""
    data = found.metadata
    name = canonicalize_name(data["Name"])
    if name in BY_HAND:
        return BY_HAND[name]
    if expression := data.get("License-Expression"):
        return str(expression)
    classifiers = [line.rsplit(" :: ", 1)[1] for line in data.get_all("Classifier") or [] if line.startswith("License")]
    named = [SHORT.get(line.lower(), line) for line in classifiers if line != "OSI Approved"]
    text = str(data.get("License") or "").strip().splitlines()[:1]
    # some give the whole licence there
    free = SHORT.get(text[0].lower(), text[0]) if text and re.match(r"(?!Copyright)[\w.,+ -]{2,60}$", text[0]) else ""
    # a classifier that names a family is less than a text that names the licence
    return free if free and (not named or named == ["BSD"]) else " and ".join(named)


def closure(extra: str) -> dict[str, Distribution]:
    """Everything that the package with one extra installs, by canonical name."""
    found: dict[str, Distribution] = {}
    waiting = deque([("doge-deploy", frozenset({extra} - {""}))])
    seen = set()
    while waiting:
        name, extras = waiting.popleft()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            one = distribution(name)
        except PackageNotFoundError:
            continue
        found[canonicalize_name(name)] = one
        for line in one.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": value}) for value in (extras or {""})):
                waiting.append((needed.name, frozenset(needed.extras)))
    found.pop("doge-deploy")
    return found


def rows() -> list[tuple[str, str, str, str]]:
    """Name, version, licence and extras of every package."""
    base = closure("")
    brought: dict[str, list[str]] = {name: [] for name in base}
    packages = dict(base)
    for extra in EXTRAS[1:]:
        for name, one in closure(extra).items():
            packages[name] = one
            if name not in base:
                brought.setdefault(name, []).append(extra)
    return [
        (name, re.sub(r"\+.*", "", one.version), license_of(one), ", ".join(brought[name]))
        for name, one in sorted(packages.items())
    ]


def page() -> str:
    """The whole page."""
    lines = ["| Package | Version | Licence | For |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    return f"{HEAD}\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

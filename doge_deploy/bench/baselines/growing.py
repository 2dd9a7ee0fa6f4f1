"""A growing bundle of the same weights, for runtimes that know the convention of Hugging Face tools only.

It is exported where none of the bundles is one, and kept; its name is the hash of everything that it depends on, this
package's own sources too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from doge_deploy.bench.baselines.catalog import LeftOut, Wanted
from doge_deploy.bundle.genai_config import GENAI_CONFIG
from doge_deploy.bundle.opening import Bundle
from doge_deploy.devices.packages import EXPORT_PACKAGES, require_export_packages
from doge_deploy.errors import MissingDependencyError
from doge_deploy.options.export import ExportOptions
from doge_deploy.options.resolved import ResolvedOptions
from doge_deploy.process.progress import NO_PROGRESS


def growing_bundle(wanted: Wanted, bundle: Bundle) -> Path:
    """A bundle of the growing layout alone, without local functions, with weights stored as in `bundle`.

    Raises:
        LeftOut: it would have to be exported, and a package for that is missing; or other tools could not run it.
        DogeDeployError: it cannot be exported.
    """
    path = bundle.path if _fits(bundle) else _exported(wanted, bundle)
    if not (path / GENAI_CONFIG).is_file():
        raise LeftOut("its graph has inputs beyond ids, mask, positions and past, which other tools do not know")
    return path


def _fits(bundle: Bundle) -> bool:
    return set(bundle.manifest.layouts) == {"growing"} and bundle.manifest.options.inline_functions


def _exported(wanted: Wanted, bundle: Bundle) -> Path:
    if wanted.checkpoint.adapter is not None:
        raise LeftOut("a growing bundle with the adapter would have to be exported; export one, and time it")
    try:
        require_export_packages("a growing bundle, to be exported,")
    except MissingDependencyError as missing:
        raise LeftOut(str(missing)) from None
    options = {**_given(bundle.manifest.options), "kv_cache": ["growing"], "inline_functions": True}
    key = {
        "checkpoint": wanted.checkpoint.sha256,
        "options": options,
        "sources": _sources(),
        "libraries": {name: importlib.metadata.version(name) for name in EXPORT_PACKAGES},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    directory = wanted.cache / f"growing-{digest[:24]}"
    if not directory.is_dir():
        wanted.started("export a growing bundle (kept for next time)")
        wanted.make("growing", {"model": str(wanted.checkpoint.path), "output": str(directory), "options": options})
    return directory


def _given(options: ResolvedOptions) -> dict[str, Any]:
    """What must be given to export once more so; what is left out comes out as it was."""
    defaults = {name: field.default for name, field in ExportOptions.model_fields.items()}
    return {name: value for name, value in asdict(options).items() if value != defaults[name]}


def _sources() -> str:
    """A hash of this package's code."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def make(model: str, output: str, options: dict[str, Any]) -> None:
    """Export; `options` are the fields of `ExportOptions`."""
    from doge_deploy.pipelines.export import export

    Path(output).parent.mkdir(parents=True, exist_ok=True)
    export(model, Path(output), ExportOptions(**options), force=False, progress=NO_PROGRESS)

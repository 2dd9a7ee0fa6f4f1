"""A manifest is checked whole: types first, then whether its parts fit each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

from doge_deploy.bundle.files import CALIBRATION_TOKENS, FILE_NAME, MANIFEST, WEIGHTS_FILE, is_inside
from doge_deploy.bundle.manifest import FORMAT_VERSION, Layout, LayoutName, Manifest
from doge_deploy.bundle.signature import UNCACHED, Signature, make_signature, uncached_signature
from doge_deploy.bundle.typed_json import must_be, typed
from doge_deploy.bundle.version_1 import to_version_2
from doge_deploy.config.keys import ACTIVATIONS
from doge_deploy.config.model import TASKS, DogeFacts
from doge_deploy.config.revisions import REVISIONS
from doge_deploy.config.rope import ROPE_TYPES
from doge_deploy.options.words import weight_format_names


def read_manifest(document: Any, findings: list[str]) -> Manifest | None:
    """The manifest that a parsed manifest.json holds, of this format version or an older one.

    Args:
        document: what `json.loads` gave.
        findings: takes a sentence for everything that is wrong; parts that do not fit each other are looked for only
            where every value has the right type.

    Returns:
        None where something is wrong.
    """
    if not isinstance(document, dict):
        findings.append(must_be("the document", document, "an object"))
        return None
    version = document.get("format_version")
    if version == 1 and version is not True:
        document = to_version_2(document, findings)
    elif version != FORMAT_VERSION or isinstance(version, float):
        if "format_version" not in document:
            findings.append(f"format_version is missing: must be a whole number from 1 to {FORMAT_VERSION}")
        else:
            findings.append(
                must_be(
                    "format_version", version, f"1 or {FORMAT_VERSION}, which is what this version of doge-deploy reads"
                )
            )
        return None
    values = {name: value for name, value in document.items() if name != "format_version"}
    manifest = typed(Manifest, values, "", findings)
    if findings:
        return None
    _check_names(manifest, findings)
    if not findings:
        findings += _facts(manifest.facts)
    if not findings:
        findings += _layouts(manifest)
    if manifest.engines:
        manifest = _with_engines(manifest, findings)
    return manifest if not findings else None


def _check_names(manifest: Manifest, findings: list[str]) -> None:
    """Keys that are names: of files, layouts and backends."""
    for name in manifest.files:
        if not is_inside(name) or name == MANIFEST:
            findings.append(f"files.{name!r}: must be {FILE_NAME}, and not {MANIFEST}")
    for name in manifest.layouts:
        if name not in get_args(LayoutName):
            findings.append(f"layouts.{name!r}: unknown layout; known: {', '.join(get_args(LayoutName))}")
    for name, layout in manifest.layouts.items():
        for backend in layout.lowered:
            if not re.fullmatch("[a-z0-9][a-z0-9._-]*", backend):
                findings.append(f"layouts.{name}.lowered.{backend!r}: must be the name of a backend, such as ort")


_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings original_max_position_embeddings keep_window_size"
).split()
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok")


def _facts(facts: DogeFacts) -> Iterator[str]:
    """What the fields of the facts must be beside their types."""
    for name in (*_SIZES, *(_EXPERT_SIZES if facts.is_moe else ())):
        if getattr(facts, name) < (0 if name == "keep_window_size" else 1):
            yield must_be(f"facts.{name}", getattr(facts, name), "a positive number")
    for name, legal in (
        ("revision", tuple(REVISIONS)),
        ("architecture", tuple(TASKS)),
        ("hidden_act", tuple(sorted(ACTIVATIONS))),
    ):
        if getattr(facts, name) not in legal:
            yield must_be(f"facts.{name}", getattr(facts, name), f"one of {', '.join(legal)}")
    if facts.rope.get("rope_type") not in ROPE_TYPES:
        yield must_be("facts.rope.rope_type", facts.rope.get("rope_type"), f"one of {', '.join(sorted(ROPE_TYPES))}")


def _layouts(manifest: Manifest) -> Iterator[str]:
    """Whether layouts, options, facts and files fit each other."""
    options, facts = manifest.options, manifest.facts
    if options.quantize is not None and options.quantize not in weight_format_names():
        yield must_be("options.quantize", options.quantize, f"one of {', '.join(weight_format_names())}, or null")
        return
    if options.block_size is not None and options.block_size < 1:
        yield must_be("options.block_size", options.block_size, "a whole number >= 1, or null")
    has_tokens = CALIBRATION_TOKENS in manifest.files
    if options.calibrate not in (None, has_tokens):
        why = f"files {'lists' if has_tokens else 'does not list'} {CALIBRATION_TOKENS}"
        yield must_be("options.calibrate", options.calibrate, f"{has_tokens}, since {why}")
    if options.max_length < 1:
        yield must_be("options.max_length", options.max_length, "a whole number >= 1")
        return
    if options.task not in TASKS[facts.architecture]:
        yield must_be(
            "options.task", options.task, f"a task of a {facts.architecture}: {', '.join(TASKS[facts.architecture])}"
        )
        return
    cached = options.task == "causal-lm"
    expected = options.kv_cache if cached else (UNCACHED,)
    if set(manifest.layouts) != set(expected) or (cached and not expected):
        yield must_be(
            "layouts",
            ", ".join(manifest.layouts),
            f"{' and '.join(expected) or 'at least one'}, by options.task and options.kv_cache",
        )
        return
    if (options.logits is None) is cached:
        yield must_be("options.logits", options.logits, "one of last, all" if cached else "null for this task")
        return
    if options.num_layers is not None and options.num_layers != facts.num_hidden_layers:
        yield must_be(
            "options.num_layers", options.num_layers, f"null or {facts.num_hidden_layers}, as facts.num_hidden_layers"
        )
    if facts.architecture == "DogeForSequenceClassification" and (facts.num_labels or 0) < 1:
        yield must_be("facts.num_labels", facts.num_labels, "a positive number")
        return
    for name, layout in manifest.layouts.items():
        yield from _layout(name, layout, manifest)
    if WEIGHTS_FILE not in manifest.files:
        yield f"files.{WEIGHTS_FILE} is missing: every graph refers to it"


def _layout(name: str, layout: Layout, manifest: Manifest) -> Iterator[str]:
    where, facts = f"layouts.{name}", manifest.facts
    named = {f"{where}.file": layout.file}
    named |= {f"{where}.lowered.{one}.file": lowered.file for one, lowered in layout.lowered.items() if lowered.file}
    for one, lowered in layout.lowered.items():
        if lowered.long_calls:
            named[f"{where}.lowered.{one}.long_calls"] = lowered.long_calls
    for key, file in named.items():
        if file not in manifest.files:
            yield must_be(key, file, f"a file that is listed under files: {', '.join(manifest.files)}")
    for backend, lowered in layout.lowered.items():
        if lowered.requires and not re.fullmatch(r"\d+(\.\d+)*", lowered.requires):
            yield must_be(f"{where}.lowered.{backend}.requires", lowered.requires, "a version such as 1.25, or empty")
    if layout.keep_window != facts.keep_window(manifest.max_length):
        yield must_be(
            f"{where}.keep_window",
            layout.keep_window,
            f"{facts.keep_window(manifest.max_length)}, by facts.keep_window_size and options.max_length",
        )
    yield from _signature(f"{where}.signature", layout.signature, _expected_signature(name, manifest))


def _expected_signature(name: str, manifest: Manifest) -> Signature:
    """The signature that follows from facts and options."""
    facts, length = manifest.facts, manifest.max_length
    if name == UNCACHED:
        return uncached_signature(facts, manifest.task, dtype=manifest.dtype, max_length=length)
    return make_signature(facts, name, dtype=manifest.dtype, max_length=length, last_logits=manifest.last_logits)


def _signature(where: str, found: Signature, expected: Signature) -> Iterator[str]:
    """The first difference of each side."""
    if found.layout != expected.layout:
        yield must_be(f"{where}.layout", found.layout, expected.layout)
    for side in ("inputs", "outputs"):
        mine, right = getattr(found, side), getattr(expected, side)
        if len(mine) != len(right):
            yield f"{where}.{side}: {len(mine)} tensors: must be {len(right)}, by facts and options"
            continue
        for index, (one, other) in enumerate(zip(mine, right, strict=True)):
            differing = [key for key in ("name", "dtype", "shape") if getattr(one, key) != getattr(other, key)]
            if differing:
                key = differing[0]
                value = getattr(other, key)
                legal = f"[{', '.join(map(str, value))}]" if key == "shape" else value
                shown = list(getattr(one, key)) if key == "shape" else getattr(one, key)
                yield must_be(f"{where}.{side}[{index}].{key}", shown, f"{legal}, by facts and options")
                break


def _with_engines(manifest: Manifest, findings: list[str]) -> Manifest:
    """The manifest with its engines as records; pydantic, which they are made with, is loaded only for them."""
    from pydantic import ValidationError

    from doge_deploy.bundle.engine_record import EngineRecord

    records: dict[str, EngineRecord] = {}
    rows: Mapping[str, Any] = manifest.engines
    for name, row in rows.items():
        try:
            records[name] = EngineRecord.model_validate(row)
        except ValidationError as error:
            findings += [_told(f"engines.{name}", dict(detail)) for detail in error.errors()]
    if findings:
        return manifest
    for name, record in records.items():
        findings += _engine(name, record, manifest)
    return replace(manifest, engines=records)


def _told(where: str, detail: Mapping[str, Any]) -> str:
    """One of pydantic's findings in our form."""
    path = where + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
    said = str(detail["msg"])
    if detail["type"] == "missing":
        return f"{path} is missing"
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    said = said.removeprefix("Input should be ").removeprefix("Value error, ")
    return must_be(path, detail["input"], said)


def _engine(name: str, record: Any, manifest: Manifest) -> Iterator[str]:
    """Whether an engine's record fits its name, the files and the layouts."""
    from doge_deploy.bundle.engine_record import ENGINES

    where, directory = f"engines.{name}", f"{ENGINES}/{name}"
    if "/" in name or not is_inside(name) or name.startswith("."):
        yield f"engines.{name!r}: must be the name of a folder in {ENGINES}/"
        return
    if record.directory != directory:
        yield must_be(f"{where}.directory", record.directory, directory)
    for part, built in ((where, record), (f"{where}.prefill", record.prefill)):
        if built is not None:
            yield from _engine_files(part, built, directory, manifest)
    if record.layout not in manifest.layouts:
        yield must_be(f"{where}.layout", record.layout, f"one of {', '.join(manifest.layouts)}")
    for key in ("onnx", "weights"):
        source = getattr(record, key)
        entry = manifest.files.get(source.file)
        if entry is None:
            yield must_be(f"{where}.{key}.file", source.file, "a file that is listed under files")
        elif entry["sha256"] != source.sha256:
            yield must_be(
                f"{where}.{key}.sha256", source.sha256, f"{entry['sha256']}, that of {source.file} under files"
            )
    if record.dtype != manifest.options.dtype:
        yield must_be(f"{where}.dtype", record.dtype, f"{manifest.options.dtype}, as options.dtype")
    if record.prefill is not None and record.window is None:
        yield must_be(f"{where}.window", None, "a number of slots, where there is a prefill")


def _engine_files(where: str, built: Any, directory: str, manifest: Manifest) -> Iterator[str]:
    """Whether the files of an engine, or of its prefill, are there as its record says."""
    for key in ("engine_file", "report_file"):
        file = getattr(built, key)
        if not file.startswith(f"{directory}/") or file not in manifest.files:
            yield must_be(f"{where}.{key}", file, f"a file of {directory}/ that is listed under files")
    entry = manifest.files.get(built.engine_file)
    if entry is not None and entry["bytes"] != built.engine_bytes:
        yield must_be(f"{where}.engine_bytes", built.engine_bytes, f"{entry['bytes']}, as under files")

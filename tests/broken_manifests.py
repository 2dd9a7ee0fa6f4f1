"""Manifests that are wrong, each in one way: how it is made, and words that the refusal must hold.

python tests/broken_manifests.py DIRECTORY      makes all of them and prints what `inspect` says
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DELETE: Any = object()
"""As a value: the key is taken away."""


@dataclass(frozen=True)
class Broken:
    """One way to break a manifest."""

    damage: Callable[[Path], None]
    words: tuple[str, ...]
    """Of the one line that is said."""


def put(path: str, value: Any, *words: str) -> Broken:
    """Set, or with `DELETE` delete, the value at a path such as `layouts/static/file`."""

    def damage(bundle: Path) -> None:
        def change(document: Any) -> None:
            *parents, last = path.split("/")
            place = document
            for parent in parents:
                place = place[int(parent) if isinstance(place, list) else parent]
            key = int(last) if isinstance(place, list) else last
            if value is DELETE:
                del place[key]
            else:
                place[key] = value

        edit(bundle, change)

    return Broken(damage, words)


def edit(bundle: Path, change: Callable[[Any], None]) -> None:
    """Change the parsed manifest in place."""
    file = bundle / "manifest.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    change(document)
    file.write_text(json.dumps(document), encoding="utf-8")


def changed(change: Callable[[Any], None], *words: str) -> Broken:
    return Broken(lambda bundle: edit(bundle, change), words)


def text(content: bytes, *words: str) -> Broken:
    def damage(bundle: Path) -> None:
        (bundle / "manifest.json").write_bytes(content)

    return Broken(damage, words)


def renamed(old: str, new: str) -> Callable[[Any], None]:
    """Another key of `files` for the same entry."""

    def change(document: Any) -> None:
        document["files"][new] = document["files"].pop(old)

    return change


def listed(name: str) -> Callable[[Any], None]:
    """An entry of `files` for a file that would be read if its name were believed."""

    def change(document: Any) -> None:
        document["files"][name] = {"sha256": "0" * 64, "bytes": 0}

    return change


def engine(**changes: Any) -> Callable[[Any], None]:
    """Values of the one engine's record; `DELETE` deletes."""

    def change(document: Any) -> None:
        (record,) = document["engines"].values()
        for key, value in changes.items():
            if value is DELETE:
                del record[key]
            else:
                record[key] = value

    return change


def engine_called(name: str) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        (record,) = document["engines"].values()
        document["engines"] = {name: record}

    return change


def a_directory(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").mkdir()


def twice(bundle: Path) -> None:
    file = bundle / "manifest.json"
    file.write_text(file.read_text().replace('"tool":', '"warnings": [], "tool":', 1))


def linked(bundle: Path) -> Path:
    """The file outside that config.json has become a link to."""
    outside = bundle.parent / f"{bundle.name}-outside.json"
    (bundle / "config.json").rename(outside)
    (bundle / "config.json").symlink_to(outside)
    return outside


def link_to_other_bytes(bundle: Path) -> None:
    outside = linked(bundle)
    outside.write_text(outside.read_text().replace("a", "b", 1))


def link_to_nothing(bundle: Path) -> None:
    linked(bundle).unlink()


def link_to_folder(bundle: Path) -> None:
    outside = linked(bundle)
    outside.unlink()
    outside.mkdir()


STATIC = "layouts/static"
INSIDE = "a relative path of '/' and plain names that stays inside the bundle"

BROKEN: dict[str, Broken] = {
    # the document
    "empty": text(b"", "manifest.json is not valid JSON"),
    "half": text(b'{"format_version": 2,', "is not valid JSON"),
    "not-utf-8": text(b'{"tool": "\xff"}', "is not valid JSON", "utf-8"),
    "list": text(b"[1, 2]", "the document=[1, 2]: must be an object"),
    "number": text(b"7", "the document=7: must be an object"),
    "nothing": text(b"{}", "format_version is missing: must be a whole number from 1 to 2"),
    "deep": text(b'{"a":' * 100_000, "its values are nested too deeply"),
    "nan": text(b'{"format_version": NaN}', "NaN is no JSON number"),
    "huge-number": text(b'{"format_version": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "key-twice": Broken(twice, ("key 'warnings' stands twice",)),
    "a-directory": Broken(
        a_directory,
        ("manifest.json cannot be read",),
    ),
    # the version
    "version-3": put("format_version", 3, "format_version=3: must be 1 or 2"),
    "version-0": put("format_version", 0, "format_version=0: must be 1 or 2"),
    "version-text": put("format_version", "2", "format_version='2': must be 1 or 2"),
    "version-float": put("format_version", 2.0, "format_version=2.0: must be 1 or 2"),
    "version-true": put("format_version", True, "format_version=True: must be 1 or 2"),
    "version-null": put("format_version", None, "format_version=None: must be 1 or 2"),
    "version-1-of-2": put("format_version", 1, "layouts.static.lowered: unknown key in format version 1"),
    # keys
    "unknown-key": put("filez", {}, "filez: unknown key (did you mean 'files'?); known: tool, libraries"),
    "no-facts": put("facts", DELETE, "facts is missing: must be an object"),
    "no-options": put("options", DELETE, "options is missing: must be an object"),
    "no-layouts": put("layouts", DELETE, "layouts is missing: must be an object of at least one layout"),
    "no-tool-version": put("tool/version", DELETE, "tool.version is missing: must be a text"),
    "tool-text": put("tool", "doge-deploy", "tool='doge-deploy': must be an object"),
    "library-number": put("libraries/onnx", 1.2, "libraries.onnx=1.2: must be a text"),
    "warning-number": put("warnings", [1], "warnings[0]=1: must be a text"),
    "warnings-text": put("warnings", "none", "warnings='none': must be a list"),
    # where it came from
    "checkpoint-hash-short": put("checkpoint/sha256", "abc", "checkpoint.sha256='abc': must be 64 lowercase hex"),
    "checkpoint-source-list": put("checkpoint/source", [], "checkpoint.source=[]: must be a text or null"),
    "checkpoint-adapter-text": put("checkpoint/adapter", "a", "checkpoint.adapter='a': must be an object"),
    "checkpoint-adapter-hash": put("checkpoint/adapter", {"sha256": "1", "source": None}, "adapter.sha256='1': must"),
    # facts
    "fact-text": put("facts/hidden_size", "128", "facts.hidden_size='128': must be a whole number"),
    "fact-float": put("facts/num_hidden_layers", 1.0, "facts.num_hidden_layers=1.0: must be a whole number"),
    "fact-zero": put("facts/head_dim", 0, "facts.head_dim=0: must be a positive number"),
    "fact-negative": put("facts/vocab_size", -1, "facts.vocab_size=-1: must be a positive number"),
    "fact-flag-number": put("facts/is_moe", 1, "facts.is_moe=1: must be true or false"),
    "fact-number-flag": put("facts/head_dim", True, "facts.head_dim=True: must be a whole number"),
    "fact-missing": put("facts/rope", DELETE, "facts.rope is missing: must be an object"),
    "fact-unknown": put("facts/hidden_sice", 3, "facts.hidden_sice: unknown key (did you mean 'hidden_size'?)"),
    "fact-revision": put("facts/revision", "2031", "facts.revision='2031': must be one of "),
    "fact-architecture": put("facts/architecture", "Llama", "facts.architecture='Llama': must be one of Doge"),
    "fact-activation": put("facts/hidden_act", "tan", "facts.hidden_act='tan': must be one of "),
    "fact-rope-type": put("facts/rope/rope_type", "spiral", "facts.rope.rope_type='spiral': must be one of "),
    "fact-rope-type-list": put("facts/rope/rope_type", [], "facts.rope.rope_type=[]: must be one of "),
    "fact-eos-text": put("facts/eos_token_id", "</s>", "facts.eos_token_id='</s>': must be a whole number or a list"),
    "fact-eos-list": put("facts/eos_token_id", [1, None], "facts.eos_token_id[1]=None: must be a whole number"),
    # options
    "option-dtype": put("options/dtype", "fp8", "options.dtype='fp8': must be one of fp32, fp16, bf16"),
    "option-task": put("options/task", "poetry", "options.task='poetry': must be one of causal-lm, "),
    "option-other-task": put(
        "options/task", "sequence-classification", "options.task=", "a task of a DogeForCausalLM: causal-lm, features"
    ),
    "option-layout": put("options/kv_cache", ["paged"], "options.kv_cache[0]='paged': must be one of static, growing"),
    "option-layout-absent": put("options/kv_cache", ["growing"], "layouts='static, growing': must be growing"),
    "option-no-layout": put("options/kv_cache", [], "layouts='static, growing': must be at least one"),
    "option-length-null": put("options/max_length", None, "options.max_length=None: must be a whole number"),
    "option-length-zero": put("options/max_length", 0, "options.max_length=0: must be a whole number >= 1"),
    "option-length-other": put("options/max_length", 95, "must be [batch_size, 2, 95, 32], by facts and options"),
    "option-routing": put("options/routing", "static", "options.routing='static': must be one of reference, per-token"),
    "option-logits-null": put("options/logits", None, "options.logits=None: must be one of last, all"),
    "option-logits-other": put("options/logits", "last", "by facts and options"),
    "option-quantize": put("options/quantize", "int3", "options.quantize='int3': must be one of fp16, fp8, "),
    "option-block": put("options/block_size", 0, "options.block_size=0: must be a whole number >= 1, or null"),
    "option-symmetric": put("options/symmetric", "yes", "options.symmetric='yes': must be true or false"),
    "option-calibrate": put("options/calibrate", "yes", "options.calibrate='yes': must be "),
    "option-calibrate-no-tokens": put(
        "options/calibrate",
        True,
        "options.calibrate=True: must be False, since files does not list calibration.json",
    ),
    "option-layers": put("options/num_layers", 7, "options.num_layers=7: must be null or 1, as facts.num_hidden"),
    "option-unknown": put("options/speed", "fast", "options.speed: unknown key; known: task, dtype"),
    # layouts
    "layouts-empty": put("layouts", {}, "layouts={}: must be an object of at least one layout"),
    "layout-unknown": changed(
        lambda document: document["layouts"].update(paged=document["layouts"].pop("static")),
        "layouts.'paged': unknown layout; known: static, growing, uncached",
    ),
    "layout-null": put(STATIC, None, "layouts.static=None: must be an object"),
    "layout-no-signature": put(f"{STATIC}/signature", DELETE, "layouts.static.signature is missing: must be an object"),
    "layout-window": put(f"{STATIC}/keep_window", False, "layouts.static.keep_window=False: must be True, by facts"),
    "layout-note": put(f"{STATIC}/notes", [[]], "layouts.static.notes[0]=[]: must be a text"),
    "layout-of-version-1": put(f"{STATIC}/ort", None, "layouts.static.ort: unknown key; known: file, signature"),
    "file-absolute": put(f"{STATIC}/file", "/etc/passwd", f"layouts.static.file='/etc/passwd': must be {INSIDE}"),
    "file-up": put(f"{STATIC}/file", "../model.onnx", f"layouts.static.file='../model.onnx': must be {INSIDE}"),
    "file-up-later": put(f"{STATIC}/file", "a/../../b", f"layouts.static.file='a/../../b': must be {INSIDE}"),
    "file-here": put(f"{STATIC}/file", "./model.onnx", f"must be {INSIDE}"),
    "file-empty": put(f"{STATIC}/file", "", f"layouts.static.file='': must be {INSIDE}"),
    "file-backslash": put(f"{STATIC}/file", "..\\model.onnx", f"must be {INSIDE}"),
    "file-drive": put(f"{STATIC}/file", "C:model.onnx", f"must be {INSIDE}"),
    "file-zero-byte": put(f"{STATIC}/file", "model\0.onnx", f"must be {INSIDE}"),
    "file-line-break": put(f"{STATIC}/file", "model\n.onnx", f"must be {INSIDE}"),
    "file-unlisted": put(
        f"{STATIC}/file", "other.onnx", "layouts.static.file='other.onnx': must be a file that is lis"
    ),
    "file-number": put(f"{STATIC}/file", 5, f"layouts.static.file=5: must be {INSIDE}"),
    # what was lowered
    "lowered-unlisted": put(
        f"{STATIC}/lowered/ort/file", "fast.onnx", "layouts.static.lowered.ort.file='fast.onnx': must be a file that is"
    ),
    "lowered-up": put(
        f"{STATIC}/lowered/ort/file", "../fast.onnx", f"lowered.ort.file='../fast.onnx': must be {INSIDE}"
    ),
    "lowered-list": put(f"{STATIC}/lowered", [], "layouts.static.lowered=[]: must be an object"),
    "lowered-null": put(f"{STATIC}/lowered/ort", None, "layouts.static.lowered.ort=None: must be an object"),
    "lowered-name": put(f"{STATIC}/lowered/A B", {"file": None}, "lowered.'A B': must be the name of a backend"),
    "lowered-version": put(f"{STATIC}/lowered/ort/requires", "new", "requires='new': must be a version such as 1.25"),
    "lowered-passes": put(f"{STATIC}/lowered/ort/applied", "all", "lowered.ort.applied='all': must be a list"),
    "lowered-declined": put(f"{STATIC}/lowered/ort/declined", {"A": 1}, "lowered.ort.declined.A=1: must be a text"),
    # the signature
    "signature-layout": put(f"{STATIC}/signature/layout", "growing", "signature.layout='growing': must be static"),
    "signature-name": put(
        f"{STATIC}/signature/inputs/0/name", "ids", "inputs[0].name='ids': must be input_ids, by facts"
    ),
    "signature-dtype": put(
        f"{STATIC}/signature/outputs/0/dtype", "float16", "outputs[0].dtype='float16': must be float32"
    ),
    "signature-shape": put(f"{STATIC}/signature/outputs/0/shape", [1], "outputs[0].shape=[1]: must be [batch_size, "),
    "signature-shape-null": put(
        f"{STATIC}/signature/outputs/0/shape", [None], "outputs[0].shape[0]=None: must be a text or"
    ),
    "signature-short": put(f"{STATIC}/signature/inputs", [], "inputs: 0 tensors: must be 5, by facts and options"),
    "signature-extra": put(f"{STATIC}/signature/inputs/0/size", 1, "inputs[0].size: unknown key; known: name, dtype"),
    # files
    "files-list": put("files", [], "files=[]: must be an object"),
    "files-without-weights": put("files/weights.safetensors", DELETE, "files.weights.safetensors is missing"),
    "files-without-graph": put(
        "files/model.onnx", DELETE, "layouts.static.file='model.onnx': must be a file that is lis"
    ),
    "files-absolute": changed(listed("/etc/passwd"), f"files.'/etc/passwd': must be {INSIDE}"),
    "files-up": changed(listed("../secret"), f"files.'../secret': must be {INSIDE}"),
    "files-manifest": changed(listed("manifest.json"), "files.'manifest.json': must be", "and not manifest.json"),
    "files-not-there": changed(renamed("config.json", "konfig.json"), "konfig.json is missing; export it again"),
    "file-entry-text": put("files/config.json", "x", "files.config.json='x': must be an object"),
    "file-entry-no-hash": put("files/config.json/sha256", DELETE, "files.config.json.sha256 is missing: must be 64"),
    "file-entry-hash-upper": put("files/config.json/sha256", "A" * 64, "must be 64 lowercase hexadecimal digits"),
    "file-entry-hash-other": put("files/config.json/sha256", "0" * 64, "config.json was altered (its sha256 is not"),
    "file-entry-negative": put(
        "files/config.json/bytes", -1, "files.config.json.bytes=-1: must be a whole number >= 0"
    ),
    "file-entry-float": put("files/config.json/bytes", 1e3, "files.config.json.bytes=1000.0: must be a whole number"),
    "file-entry-mode": put("files/config.json/mode", 5, "files.config.json.mode: unknown key; known: sha256, bytes"),
    "link-to-other-bytes": Broken(link_to_other_bytes, ("config.json was altered (its sha256 is not the manifest's)",)),
    "link-to-nothing": Broken(link_to_nothing, ("config.json is missing",)),
    "link-to-folder": Broken(link_to_folder, ("config.json is missing",)),
    # engines
    "engines-list": put("engines", [], "engines=[]: must be an object"),
    "engine-null": changed(
        lambda document: document.update(engines={"a": None}), "engines.a=None: must be a valid dictionary"
    ),
    "engine-name": changed(engine_called("../x"), "engines.'../x': must be the name of a folder in engines/"),
    "engine-other-name": changed(engine_called("x"), "engines.x.directory='engines/", "must be engines/x"),
    "engine-key": changed(engine(colour="red"), ".colour: unknown key"),
    "engine-no-key": changed(engine(layout=DELETE), ".layout is missing"),
    "engine-target": changed(engine(target="tpu"), ".target='tpu': must be 'trt-rtx' or 'trt'"),
    "engine-dtype": changed(engine(dtype="fp16"), ".dtype='fp16': must be fp32, as options.dtype"),
    "engine-layout": changed(engine(layout="paged"), ".layout='paged': must be one of static, growing"),
    "engine-file": changed(engine(engine_file="model.onnx"), ".engine_file='model.onnx': must be a file of engines/"),
    "engine-file-up": changed(engine(report_file="engines/../x"), ".report_file='engines/../x': must be a file of"),
    "engine-bytes": changed(engine(engine_bytes=7), ".engine_bytes=7: must be 6, as under files"),
    "engine-source": changed(
        engine(onnx={"file": "model.onnx", "sha256": "0" * 64}), ".onnx.sha256='000", "that of model.onnx under files"
    ),
    "engine-source-file": changed(
        engine(weights={"file": "w", "sha256": "0" * 64}),
        ".weights.file='w': must be a file that is listed under files",
    ),
}


def main(sound: Path, out: Path) -> None:
    """Make all of them below `out`, and print what `doge-deploy inspect` says about each."""
    from doge_deploy.cli.main import run_command

    for name, broken in BROKEN.items():
        bundle = Path(shutil.copytree(sound, out / name))
        broken.damage(bundle)
        print(f"\n{name}", flush=True)
        print(f"exit code {run_command(['inspect', str(bundle)])}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

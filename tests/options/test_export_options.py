"""Export options: where they come from, and what is said about a bad one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from doge_deploy.errors import UsageError
from doge_deploy.options.export import ExportOptions, load_export_options
from doge_deploy.options.resolved import ResolvedOptions

CONFIGS = sorted((Path(__file__).parents[2] / "export_configs").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, overrides: dict[str, Any], assignments: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        load_export_options(path, overrides, assignments)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_export_config_loads(path: Path) -> None:
    assert load_export_options(path, {}, [])
    document = yaml.safe_load(path.read_text())
    assert document["name"] == path.stem
    assert document["description"]


def test_export_configs_are_the_three_uses() -> None:
    options = {path.stem: load_export_options(path, {}, []) for path in CONFIGS}
    assert options["cpu"] == ExportOptions()
    assert (options["huggingface"].kv_cache, options["huggingface"].logits) == (("growing",), "all")
    assert (options["server"].kv_cache, options["server"].routing) == (("static", "growing"), "per-token")


@pytest.mark.parametrize(
    ("given", "layouts"),
    [
        ("growing", ("growing",)),
        (["growing", "static"], ("static", "growing")),
        (("static", "static"), ("static",)),
    ],
    ids=["one-name", "any-order", "twice"],
)
def test_kv_cache_is_normalised(given: Any, layouts: tuple[str, ...]) -> None:
    assert ExportOptions(kv_cache=given).kv_cache == layouts


def test_options_survive_a_manifest() -> None:
    options = ExportOptions(kv_cache=("growing",), max_length=7)
    assert ExportOptions(**options.model_dump(mode="json")) == options


def test_later_sources_win(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "export: {dtype: fp16, logits: all, max_length: 8, routing: per-token}")
    overrides = {"max_length": 32, "num_layers": None, "kv_cache": ()}
    options = load_export_options(path, overrides, ["logits=last", "max_length=16"])
    assert options == ExportOptions(dtype="fp16", logits="last", max_length=32, routing="per-token")


def test_a_file_without_options_means_the_defaults(tmp_path: Path) -> None:
    assert load_export_options(write(tmp_path / "a.yaml", "name: empty"), {}, []) == ExportOptions()


BAD_FILES = {
    "unknown-option": (
        "export: {dtyp: fp16}",
        "unknown key 'dtyp' (did you mean 'dtype'?); known: task, dtype, kv_cache",
    ),
    "unknown-section": ("exports: {dtype: fp16}", "unknown key 'exports' (did you mean 'export'?)"),
    "option-at-top": ("dtype: fp16", "unknown key 'dtype'; known: name, description, sources, device, export, build"),
    "bad-value": ("export: {dtype: fp8}", "dtype='fp8': must be one of fp32, fp16, bf16"),
    "bad-layout": (
        "export: {kv_cache: [static, paged]}",
        "kv_cache=['static', 'paged']: must be static, growing or",
    ),
    "no-layout": ("export: {kv_cache: []}", "kv_cache=[]"),
    "text-number": ("export: {max_length: '8'}", "max_length='8': must be a whole number >= 1"),
    "zero-length": ("export: {max_length: 0}", "max_length=0"),
    "boolean-number": ("export: {num_layers: true}", "num_layers=True"),
    "two-problems": ("export: {logits: none, routing: none}", "routing='none'"),
    "empty": ("", "must hold a mapping with the key 'export', not nothing"),
    "list": ("- dtype", "not a list"),
    "export-is-text": ("export: fp16", "export='fp16': must be a mapping"),
    "not-yaml": ("export: {dtype: [", "is not valid YAML"),
    "key-twice": ("export: {dtype: fp16, dtype: fp32}", "key 'dtype' stands twice"),
    "python-object": ("export: !!python/object/apply:os.getcwd []", "is not valid YAML"),
}


@pytest.mark.parametrize(("text", "words"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yaml", text)
    message = refusal(path, {}, [])
    assert message.startswith(str(path))
    assert words in message


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.yaml", {}, [])
    assert "Is a directory" in refusal(tmp_path, {}, [])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "not UTF-8" in refusal(tmp_path / "binary.yaml", {}, [])


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("dtype=fp8", "--set dtype=fp8: dtype='fp8': must be one of"),
        ("max_len=3", "unknown key 'max_len' (did you mean 'max_length'?)"),
        ("dtype", "must have the form key=value"),
        ("=fp16", "must have the form key=value"),
        ("dtype=[", "is not valid YAML"),
    ],
    ids=["value", "key", "no-equals-sign", "no-key", "not-yaml"],
)
def test_bad_assignment(assignment: str, words: str) -> None:
    assert words in refusal(None, {}, [assignment])


def test_bad_override_names_the_option() -> None:
    assert refusal(None, {"num_layers": 0}, []).startswith("--num-layers: num_layers=0: must be")


def test_a_value_mended_by_a_later_source_is_not_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "export: {dtype: fp8}")
    assert load_export_options(path, {}, ["dtype=bf16"]).dtype == "bf16"


def test_options_import_neither_torch_nor_transformers() -> None:
    code = "import sys, doge_deploy.options.export; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_resolved_options_are_the_same_fields() -> None:
    own = [name for name in ExportOptions.model_fields if name != "lower_for"]  # that stands with each layout
    assert [field.name for field in fields(ResolvedOptions)] == own
    given = ExportOptions(dtype="fp16", kv_cache=("growing",), quantize=None, num_layers=3)
    resolved = ResolvedOptions.of(given, max_length=7)
    assert resolved.to_json() == {**given.model_dump(mode="json", include=set(own)), "max_length": 7}
    features = ResolvedOptions.of(ExportOptions(task="features"), max_length=7)
    assert (features.kv_cache, features.logits) == ((), None)

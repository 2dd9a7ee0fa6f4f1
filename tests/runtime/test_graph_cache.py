"""The cache of optimised graphs: the same numbers with and without it, and whatever is wrong in it changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bundles import own_bundle, shared_bundle

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.ort import graph_cache, open_runner
from doge_deploy.runtime.ort import open as opening
from doge_deploy.runtime.ort.graph_cache import RECORD, VARIABLE, cache_folder

LAYOUTS = {"kv_cache": ("static", "growing")}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How sessions were opened, in order: `plain`, `saving` or `optimised`."""
    kinds: list[str] = []
    original = opening.open_session

    def recorded(graph: Any, **options: Any) -> Any:
        kinds.append("optimised" if options.get("optimised") else "saving" if options.get("save_to") else "plain")
        return original(graph, **options)

    monkeypatch.setattr(opening, "open_session", recorded)
    yield kinds


@pytest.fixture
def bundle(moe_doge: Path) -> Bundle:
    return open_bundle(shared_bundle(moe_doge, **LAYOUTS))


def numbers(bundle: Bundle, layout: str = "static", **options: Any) -> FloatArray:
    runner = open_runner(bundle, layout, threads=1, **options)
    runner.reset(1)
    steps = [runner.run(np.array([ids])) for ids in ([3, 4, 5, 6], [7], [8])]
    return np.concatenate(steps, axis=1)


@pytest.mark.parametrize("layout", ["static", "growing"])
def test_numbers_do_not_depend_on_the_cache(layout: str, bundle: Bundle, cache: Path, opened: list[str]) -> None:
    without = numbers(bundle, layout, cache=False)
    found = [numbers(bundle, layout) for _ in range(2)]
    assert opened == ["plain", "saving", "optimised"]
    for one in found:
        np.testing.assert_array_equal(one, without)
    assert len(list(cache.iterdir())) == 1, "no folder of a session that was being saved is left"


def test_weights_are_written_in_pieces(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux would map whole pages of 2 MB of what is written at once."""
    original, seen = graph_cache._write_in_pieces, {}

    def recorded(file: Path) -> None:
        before = file.read_bytes()
        original(file)
        seen[file.name] = file.read_bytes() == before

    monkeypatch.setattr(graph_cache, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(graph_cache, "_write_in_pieces", recorded)
    numbers(bundle)
    assert seen == {"model.weights": True}
    (entry,) = cache.iterdir()
    assert {file.name for file in entry.iterdir()} == {graph_cache.GRAPH, RECORD, *seen}


def cut(entry: Path) -> None:
    """The last byte of a file is missing, as after a crash."""
    file = next(file for file in entry.iterdir() if file.suffix == ".weights")
    file.write_bytes(file.read_bytes()[:-1])


def flipped(entry: Path) -> None:
    file = entry / "model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def garbage_that_fits_its_record(entry: Path) -> None:
    (entry / "model.onnx").write_bytes(b"no graph")
    record = json.loads((entry / RECORD).read_text())
    record["model.onnx"] = graph_cache._file_entry(entry / "model.onnx")
    (entry / RECORD).write_text(json.dumps(record))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "flipped": flipped,
    "garbage": garbage_that_fits_its_record,
    "no-record": lambda entry: (entry / RECORD).unlink(),
    "record-without-graph": lambda entry: (entry / RECORD).write_text("{}"),
    "record-of-another-form": lambda entry: (entry / RECORD).write_text('["model.onnx"]'),
    "weights-missing": lambda entry: next(file for file in entry.iterdir() if file.suffix == ".weights").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_made_anew(
    damage: Callable[[Path], object], bundle: Bundle, cache: Path, opened: list[str]
) -> None:
    wanted = numbers(bundle)
    (entry,) = cache.iterdir()
    damage(entry)
    np.testing.assert_array_equal(numbers(bundle), wanted)
    np.testing.assert_array_equal(numbers(bundle), wanted)
    assert opened[-1] == "optimised" and opened.count("saving") == 2


def test_what_an_entry_depends_on(moe_doge: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these gives an entry of its own, so none is taken for another."""
    bundle = open_bundle(own_bundle(tmp_path / "b", moe_doge, **LAYOUTS))
    seen: list[set[str]] = [set()]

    def is_new(what: str, **options: Any) -> None:
        numbers(bundle, **options)
        seen.append({entry.name for entry in cache.iterdir()})
        assert len(seen[-1]) == len(seen[-2]) + 1, what

    is_new("the first")
    is_new("another layout", layout="growing")
    is_new("the standard graph", portable=True)
    names = {graph_cache._name(bundle, "model.onnx", {"flush_denormals": value}) for value in ("True", "False")}
    assert len(names) == 2, "constants may be folded otherwise where denormal numbers are taken for zero"
    weights = bundle.path / "weights.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    is_new("weights that were written since")
    with monkeypatch.context() as patch:
        patch.setattr(graph_cache, "processor_features", lambda: ("fpu",))
        is_new("another processor")
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "1.99.0")
        is_new("another version")
    numbers(bundle)
    assert {entry.name for entry in cache.iterdir()} == seen[-1], "the entry of before is found again"


def test_a_wrong_entry_would_be_seen(bundle: Bundle, dense_doge: Path, cache: Path) -> None:
    """What the name is for: another bundle's graph under it gives other numbers, or none."""
    wanted = numbers(bundle)
    (entry,) = cache.iterdir()
    other = open_bundle(shared_bundle(dense_doge, **LAYOUTS))
    numbers(other)
    (foreign,) = set(cache.iterdir()) - {entry}
    shutil.rmtree(entry)
    shutil.copytree(foreign, entry)
    assert not np.array_equal(numbers(bundle), wanted)


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_off_by_the_environment(value: str, bundle: Bundle, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert cache_folder() is None
    numbers(bundle)
    assert opened == ["plain"]


def test_off_by_the_option(tiny_bundle: Path, cache: Path) -> None:
    command = ["generate", str(tiny_bundle), "--prompt", "a", "--max-new-tokens", "1", "--quiet", "--threads", "1"]
    assert run_command([*command, "--no-graph-cache"]) == 0
    assert not cache.exists()
    assert run_command(command) == 0
    assert len(list(cache.iterdir())) == 1


def test_the_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert folder == tmp_path / "doge-deploy" / "onnxruntime"
    assert folder.stat().st_mode & 0o077 == 0, "what others may write there would be run"


def test_a_folder_of_somebody_else_is_left_alone(
    bundle: Bundle, cache: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    monkeypatch.setattr(graph_cache.os, "geteuid", lambda: cache.stat().st_uid + 1)
    numbers(bundle)
    assert opened == ["plain"] and not list(cache.iterdir())


def test_a_folder_that_cannot_be_made(bundle: Bundle, cache: Path, opened: list[str]) -> None:
    cache.write_text("a file")
    numbers(bundle)
    assert opened == ["plain"]


def test_a_full_disk(bundle: Bundle, cache: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = numbers(bundle, cache=False)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    np.testing.assert_array_equal(numbers(bundle), wanted)
    assert opened == ["plain", "saving", "plain"] and not list(cache.iterdir())


def test_no_entry_where_memory_is_scarce(
    bundle: Bundle, cache: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = bundle.manifest.files["weights.safetensors"]["bytes"]
    monkeypatch.setattr(graph_cache, "available_memory", lambda: 4 * weights)
    numbers(bundle)
    assert opened == ["plain"] and not list(cache.iterdir())


def test_the_longest_unused_entry_goes_first(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers(bundle, "static")
    (static,) = cache.iterdir()
    numbers(bundle, "growing")
    (growing,) = set(cache.iterdir()) - {static}
    os.utime(growing / RECORD, (0, 0))
    os.utime(static / RECORD, (1, 1))
    numbers(bundle, "growing")  # used since
    size = sum(file.stat().st_size for entry in cache.iterdir() for file in entry.iterdir())
    monkeypatch.setattr(graph_cache, "LIMIT_BYTES", size + size // 4)  # room for two entries, not for three
    numbers(bundle, "static", portable=True)
    assert growing in cache.iterdir() and static not in cache.iterdir()

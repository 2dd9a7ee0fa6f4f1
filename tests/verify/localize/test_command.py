"""`verify --localize`, as docs/verify.md shows it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from bundles import broken_copy, edit_tensor, shared_bundle
from localize_faults import one_percent

from doge_deploy import api
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint.find import find_checkpoint
from doge_deploy.cli.main import run_command
from doge_deploy.errors import UsageError
from doge_deploy.graph.stages import POINT

PAGE = (Path(__file__).parents[3] / "docs" / "verify.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n## Where a bundle differs from its reference\n")[1].split("\n## ")[0]
BLOCK = re.search(r"```console\n\$ doge-deploy (.*)\n((?:.*\n)*?)```", SECTION)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """doge-tiny with the largest number of one weight raised by 1%."""

    def raise_one(path: Path) -> None:
        edit_tensor(path, "model.layers.1.self_attn.k_proj.weight.T", one_percent)

    return broken_copy(shared_bundle("doge-tiny"), tmp_path_factory.mktemp("faulty") / "doge-tiny", weights=raise_one)


def words(text: str) -> list[str]:
    """Lines without numbers that depend on the machine, and without the spacing of a table."""
    rows = [re.sub(r"\d+(\.\d+)?(e[-+]\d+)?[%x]?", "N", line) for line in text.splitlines()]
    return [" ".join(re.sub(r"[━┃│┏┓┳┡┩╇┴└┘─╞╪╡]+", " ", row).split()) for row in rows if row.strip()]


def test_the_page_shows_what_is_printed(faulty: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert BLOCK is not None
    command = BLOCK[1].replace("build/wrong", str(faulty)).split(" --case ")
    code = run_command([*command[0].split(), "--case", command[1].strip('"')])
    captured = capfd.readouterr()
    assert code == 1
    shown = BLOCK[2].replace("...\n", "", 1)  # for what is said meanwhile
    assert words(captured.out + captured.err.splitlines()[-1]) == words(shown)
    assert "own error" in captured.err
    assert captured.err.splitlines()[-1].count("stage `k`") == 1


def test_a_sound_bundle_has_nothing_to_find(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(shared_bundle("doge-tiny")), "--localize", "--case", "static/prefill"]) == 0
    assert capfd.readouterr().out.strip() == (
        "static/prefill: nothing to find: every stage of every call is within noise"
    )


@pytest.mark.sweep
def test_the_first_case_that_fails_is_localised(faulty: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(faulty), "--localize", "--greedy-steps", "4"]) == 1
    out = capfd.readouterr().out
    assert "static/prefill, call 0, layer 1, stage `k`" in out
    assert "FAIL static/prefill" in out


@pytest.mark.sweep
def test_a_bundle_that_passes_has_nothing_to_find(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(shared_bundle("doge-tiny")), "--localize", "--greedy-steps", "4"]) == 0
    assert "nothing to find: every case is within tolerance" in capfd.readouterr().out


def test_what_cannot_be_looked_into_is_said_before_anything_is_judged(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(shared_bundle("doge-tiny")), "--lowering", "--localize"]) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert not captured.out and line.endswith(
        "leave out --lowering for the graphs of the CPU, or export with --max-length 64, whose lowering differs in "
        "attention alone and is looked into"
    )


def test_the_lowering_for_tensorrt_is_a_column(tmp_path: Path) -> None:
    found = api.localize(shared_bundle("doge-tiny", max_length=64), "decode", lowering=True)
    assert found.passed, found.lines()
    assert found.columns == ("TensorRT-lowered", "standard")


def test_the_graphs_of_a_bounded_cache_are_no_columns() -> None:
    with pytest.raises(UsageError, match="does not look into the two graphs of a cache that holds the window"):
        api.localize(shared_bundle("doge-tiny"), "window decode", lowering=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--case", "prefill"), "give --localize too"),
        (("--localize", "--case", "prefil"), "unknown case (did you mean 'prefill'?)"),
        (("--localize", "--case", "grown/prefill"), "no layout 'grown'; it has static"),
        (("--localize", "--backend", "torch-kernels"), "torch-kernels runs none that it is given"),
        (("--localize", "--case", "prefill", "--json", "report.json"), "leave out --json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_do_not_fit(options: tuple[str, ...], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(shared_bundle("doge-tiny")), *options]) == 2
    assert text in capfd.readouterr().err


def test_neither_a_case_nor_a_report() -> None:
    with pytest.raises(UsageError, match="name a case, or give a report"):
        api.localize(shared_bundle("doge-tiny"))


def test_a_bundle_of_an_older_version_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def unmark(model: object) -> None:
        for node in model.graph:  # type: ignore[attr-defined]
            for name in [name for name in node.metadata_props if name.startswith(POINT)]:
                del node.metadata_props[name]

    old = broken_copy(shared_bundle("doge-tiny"), tmp_path / "old", graph=unmark)
    assert open_bundle(old).manifest.layouts
    assert run_command(["verify", str(old), "--localize", "--case", "prefill"]) == 3
    assert "export the checkpoint again" in capfd.readouterr().err


def test_a_changed_config_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(find_checkpoint("doge-tiny"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    bundle = str(shared_bundle("doge-tiny", logits="all"))
    command = ["verify", bundle, "--reference", str(checkpoint), "--localize", "--case", "prefill"]
    assert run_command(command) == 1
    text = capfd.readouterr()
    assert "changed since the export: rms_norm_eps is 0.001, in the bundle 1e-06" in text.out + text.err

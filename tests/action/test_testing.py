"""The plugin for pytest: it costs nothing until it is used, and fails where a bundle does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import made_reports as made
import pytest
from bundles import own_bundle

from doge_deploy import api
from doge_deploy.testing import Parity


def test_loading_it_imports_nothing_of_this_package() -> None:
    code = (
        "import sys, pytest\nbefore = set(sys.modules)\nimport doge_deploy.testing\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = [name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names]
    assert new == ["doge_deploy", "doge_deploy.testing"]


def test_pytest_finds_it_and_runs_where_nothing_else_is_installed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(doge_parity):\n    doge_parity('doge-tiny')\n")
    (tmp_path / "conftest.py").write_text(
        "import sys\nfor name in ('torch', 'transformers', 'onnx'):\n    sys.modules[name] = None\n"
        "import importlib.metadata as m\nreal = m.version\n"
        "def version(name):\n    if name in ('torch', 'onnx'):\n        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\nm.version = version\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "doge-tiny: export needs torch, which is not installed: pip install 'doge-deploy[export]'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_checkpoint_passes(doge_parity: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(model: str, output: Path, **options: object) -> None:
        assert options == {"adapter": None, "kv_cache": ("growing",)}
        own_bundle(output, model, kv_cache=("static", "growing"), logits="all")

    monkeypatch.setattr(api, "export", export)  # an export takes long, and is made once for all tests
    report = doge_parity("doge-tiny", layouts=("growing",), greedy_steps=2, kv_cache=("growing",))
    assert report.passed
    assert {result.layout for result in report.results} == {"growing"}


def test_a_difference_fails_with_the_table(doge_parity: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "export", lambda *arguments, **options: None)
    monkeypatch.setattr(api, "verify", lambda *arguments, **options: made.report(made.case("prefill", key=2.0)))
    with pytest.raises(pytest.fail.Exception, match=r"\| \*\*FAIL\*\* \| static \| prefill \|.*200%") as failure:
        doge_parity("doge-tiny")
    assert not failure.value.pytrace


def test_an_option_that_is_not_legal_fails_in_one_line(doge_parity: Parity) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"doge-tiny: .*fp7"):
        doge_parity("doge-tiny", dtype="fp7")  # type: ignore[arg-type]


def test_a_bundle_that_is_kept_is_not_exported_again(
    doge_parity: Parity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    judged = []
    monkeypatch.setattr(api, "export", lambda *arguments, **options: pytest.fail("it was exported"))
    monkeypatch.setattr(
        api, "verify", lambda bundle, **options: judged.append(bundle) or made.report(made.case("prefill"))
    )
    doge_parity("doge-tiny", bundle=tmp_path)
    assert judged == [tmp_path]
    with pytest.raises(pytest.fail.Exception, match=r"dtype: of an export, and bundle='.*' is kept as it is"):
        doge_parity("doge-tiny", bundle=tmp_path, dtype="fp16")


def test_a_checkpoint_that_is_not_there_is_named_once(doge_parity: Parity) -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        doge_parity("nowhere/at-all/checkpoint")
    assert str(failure.value).count("nowhere/at-all/checkpoint") == 1

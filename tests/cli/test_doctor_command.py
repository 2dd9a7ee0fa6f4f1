"""`doge-deploy doctor`: what it prints, its JSON, its exit codes, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from doge_deploy.cli.main import run_command


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "processor" in output and "build --target trt-rtx" in output and "onnxruntime" in output


def test_this_machine_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "doge-tiny", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in answer["targets"]} >= {"export", "verify", "build --target trt"}
    assert answer["machine"]["libraries"]["onnxruntime"]["details"]["providers"]
    (device,) = answer["devices"]
    assert device["name"] == "this machine" and any(option["usable"] for option in device["deployment_options"])


def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--target", "jetson-orin-jp6"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "JetPack 6.2" in output and "remedy: install JetPack 7.2 or later" in output


def test_does_it_fit(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    arguments = ["doctor", str(tiny_bundle), "--target", "thor", "--target", "rtx-desktop", "--json"]
    assert run_command(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["machine"] is None and answer["model"]["dtype"] == "fp32"
    assert [device["name"] for device in answer["devices"]] == ["jetson-agx-thor", "rtx-desktop"]
    option = answer["devices"][0]["deployment_options"][0]
    assert (option["backend"], option["lowering"], option["usable"]) == ("trt", "plugins", True)
    assert option["needs"]["weight_bytes"] > 0


def test_a_device_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    facts = "kind: desktop, product: Mine, compute_capability: 8.6, memory_gib: 1, bandwidth_gb_per_s: 9, cuda: '13.0'"
    path.write_text(f"name: mine\nsources: ['all: me']\ndevice: {{{facts}}}\n", encoding="utf-8")
    assert run_command(["doctor", "--target", str(path)]) == 0
    assert "Mine, compute capability 8.6" in capsys.readouterr().out


def test_no_way_at_all_is_exit_code_4(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    facts = "{kind: cpu, product: Toy, memory_gib: 0.001}"
    path.write_text(f"name: toy\nsources: ['all: me']\ndevice: {facts}\n", encoding="utf-8")
    assert run_command(["doctor", "doge-tiny", "--target", str(path)]) == 4
    captured = capsys.readouterr()
    assert "of memory; 1.0 MiB are free" in " ".join(captured.out.split())
    assert captured.err.startswith("doge-deploy: error: no deployment option for toy")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--target", "tpu"], 2, "no device 'tpu' (did you mean 'cpu'?); known: cpu"),
        (["doge-tny"], 2, "no such directory"),
        (["--target", "none.yaml"], 2, "No such file"),
    ],
    ids=["device", "model", "file"],
)
def test_bad_input(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", *arguments]) == code
    assert words in capsys.readouterr().err


def test_a_device_is_answered_without_anything_heavy() -> None:
    code = (
        "import sys\nfrom doge_deploy.cli.main import run_command\n"
        "assert run_command(['doctor', 'doge-tiny', '--target', 'h100', '--json']) == 0\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx', 'onnx_ir', 'tensorrt', 'cuda', 'rich'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"

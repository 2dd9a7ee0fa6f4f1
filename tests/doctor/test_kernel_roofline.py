"""The roofline of the plugins: its command, and the table in docs/plugins.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from doge_deploy.cli.main import run_command
from doge_deploy.config.published import SIZES, published_facts
from doge_deploy.doctor.kernel_roofline import Call, RooflineDevice, roofline
from doge_deploy.errors import UsageError
from doge_deploy.kernels.registry import installed

DOCS = Path(__file__).parents[2] / "docs" / "plugins.md"
MACHINE = RooflineDevice("a device", 87, bandwidth_gb_per_s=100.0, fp16_tflops=40.0)


def documented() -> dict[str, list[tuple[float, float]]]:
    """(gain of the operators, of the step) at each past, by model; the same on every device."""
    table: dict[str, list[tuple[float, float]]] = {}
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and cells[0] in SIZES:
            gains = [(float(cells[i]), float(cells[i + 1])) for i in (3, 6, 9)]
            assert table.setdefault(cells[0], gains) == gains, cells
    return table


@pytest.mark.parametrize("model", ["20M", "320M", "20M-MoE"])
def test_the_documented_gains_are_those_of_today(model: str) -> None:
    for past, (operators, step) in zip((2048, 8192, 32768), documented()[model], strict=True):
        result = roofline(published_facts(model), MACHINE, Call(past), installed())
        assert (round(result.operator_gain, 2), round(result.step_gain, 2)) == (operators, step)


def test_beyond_the_window_the_plugins_cost_no_more_keys() -> None:
    near, far = (roofline(published_facts("20M"), MACHINE, Call(past), installed()) for past in (4096, 32768))
    attention = [next(line for line in result.lines if "Split" in line.kernel) for result in (near, far)]
    assert attention[0].cost == attention[1].cost


def test_a_step_reads_every_weight_of_a_tied_model_once() -> None:
    facts = published_facts("20M")
    rest = roofline(facts, MACHINE, Call(16), installed()).rest
    assert rest.loaded_bytes == 2 * 13_118_728  # 13.1 million numbers: embedding 8.4, eight layers of 0.59


def test_compute_bounds_a_launch_with_enough_tokens() -> None:
    slow = RooflineDevice("slow", 87, bandwidth_gb_per_s=1e6, fp16_tflops=1.0)
    result = roofline(published_facts("20M"), slow, Call(0, new=512), installed())
    prefill = next(line for line in result.lines if line.kernel == "DynamicMaskAttend")
    assert slow.microseconds(prefill.cost) == pytest.approx(prefill.cost.flops / 1e6)


def test_the_command_says_that_it_is_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plugins", "roofline", "--device", "jetson-orin-nano", "--model", "20M", "--past", "4096"]
    assert run_command(arguments) == 0
    shown = capsys.readouterr().out
    assert "Computed, not measured" in shown
    assert "102 GB/s" in shown
    assert "DynamicMaskSplitSelected" in shown
    assert run_command([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["kind"] == "computed, not measured"
    assert any("bandwidth" in source for source in answer["sources"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "h1000", "--model", "20M"], 2, "--device h1000: no such device (did you mean 'h100'?)"),
        (["--device", "cpu", "--model", "20M"], 2, "--device cpu: no such device"),
        (["--device", "h100", "--model", "/nowhere"], 2, "/nowhere"),
    ],
    ids=["device", "no-gpu", "model"],
)
def test_a_wrong_name_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert run_command(["plugins", "roofline", "--past", "10", *arguments]) == code
    assert message in capsys.readouterr().err


def test_an_unknown_size_is_named() -> None:
    with pytest.raises(UsageError, match="'20' is not a published size"):
        published_facts("20")

"""The faults of planted_faults.py still apply: a source that moved takes its fault along."""

from __future__ import annotations

import pytest
from planted_faults import FAULTS, ROOT


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_applies_and_has_tests_that_should_catch_it(name: str) -> None:
    fault = FAULTS[name]
    assert fault.find(ROOT) is fault.patch
    assert fault.patch.new != fault.patch.old
    assert all(list((ROOT / "tests").rglob(file)) for file in fault.likely[:1])


def test_each_package_has_a_fault() -> None:
    packages = {fault.package for fault in FAULTS.values()}
    assert packages >= set(
        "checkpoint config options bundle model kernels graph targets/ort targets/trt pipelines runtime verify doctor "
        "bench cli serve".split()
    )


def test_each_line_of_what_the_server_promises_has_a_fault() -> None:
    lines = {fault.effect.split(":")[0] for fault in FAULTS.values() if fault.package == "serve"}
    assert lines >= {str(number) for number in range(1, 17)}

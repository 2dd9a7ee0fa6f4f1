"""Pages that are made from the sources, or from what is installed, are as these are."""

from __future__ import annotations

import sys
from types import ModuleType

import cli_page
import licenses_page
import pytest
import python_reference_page


@pytest.mark.parametrize("made", [cli_page, python_reference_page], ids=["cli", "python-reference"])
def test_the_page_is_what_the_sources_make(made: ModuleType) -> None:
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), f"stale: python tests/{made.__name__}.py"


def test_every_dependency_has_a_licence() -> None:
    rows = licenses_page.rows()
    assert {"click", "numpy", "onnxruntime", "tokenizers", "torch"} <= {name for name, *_ in rows}
    assert not [row for row in rows if not row[2]]


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="another Python needs other packages")
def test_the_page_of_licences_has_what_is_installed() -> None:
    assert licenses_page.PAGE.read_text(encoding="utf-8") == licenses_page.page(), (
        "stale: python tests/licenses_page.py"
    )

"""A fixture for pytest that compares a checkpoint with its bundle; pytest finds it by itself (`pytest11`).

Nothing but pytest is imported until a test asks for the fixture: every run of pytest in the environment loads this.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Unpack

import pytest

if TYPE_CHECKING:
    from doge_deploy.options.keywords import ExportKeywords
    from doge_deploy.verify.report import Report


class Parity(Protocol):
    """What `doge_parity` is."""

    def __call__(
        self,
        model: str | Path,
        *,
        bundle: str | Path | None = None,
        adapter: str | Path | None = None,
        baseline: str | Path | None = None,
        layouts: Sequence[str] = (),
        greedy_steps: int = 128,
        portable: bool = False,
        **options: Unpack[ExportKeywords],
    ) -> Report:
        """Verify a bundle of `model`; fail the test with a table where they differ.

        Args:
            model: a directory, a Hub id, or a bundled name.
            bundle: one that is kept, and verified as it is: the test fails when the checkpoint or the bundle changed.
                Without it `model` is exported anew into a temporary folder: the test fails when the packages that
                export, run or judge it no longer agree.
            adapter: as of `doge_deploy.export`.
            options: the same, for an export; they cannot be given with `bundle`.
            baseline, layouts, greedy_steps, portable: as of `doge_deploy.verify`.

        Returns:
            The report, where it passed.
        """


@pytest.fixture
def doge_parity(tmp_path_factory: pytest.TempPathFactory) -> Parity:
    """A function that fails the test unless a bundle, kept or exported by it, computes what the checkpoint does.

    What cannot be exported or judged, because a package is missing for example, fails too: a test that proves nothing
    must not pass.
    """

    def check(
        model: str | Path,
        *,
        bundle: str | Path | None = None,
        adapter: str | Path | None = None,
        baseline: str | Path | None = None,
        layouts: Sequence[str] = (),
        greedy_steps: int = 128,
        portable: bool = False,
        **options: Unpack[ExportKeywords],
    ) -> Report:
        from doge_deploy import api

        if bundle is not None and options:
            pytest.fail(
                f"{', '.join(options)}: of an export, and bundle={str(bundle)!r} is kept as it is", pytrace=False
            )
        folder = tmp_path_factory.mktemp("doge_parity") / "bundle" if bundle is None else Path(bundle)
        merged = None if adapter is None else str(adapter)
        try:
            if bundle is None:
                api.export(model, folder, adapter=adapter, **options)
            report = api.verify(
                folder,
                reference=str(model),
                adapter=merged,
                baseline=baseline,
                layouts=layouts,
                greedy_steps=greedy_steps,
                portable=portable,
            )
        except api.DogeDeployError as error:
            pytest.fail(str(error) if str(model) in str(error) else f"{model}: {error}", pytrace=False)
        if not report.passed:
            from doge_deploy.verify.markdown import report_markdown

            pytest.fail(report_markdown(report), pytrace=False)
        return report

    return check

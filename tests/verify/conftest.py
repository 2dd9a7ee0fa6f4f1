"""Every report that these tests make is written in each form, and its JSON is held against the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from doge_deploy.verify import run
from doge_deploy.verify.files import report_json
from doge_deploy.verify.markdown import report_markdown
from doge_deploy.verify.page.write import report_html
from doge_deploy.verify.report import Report

SCHEMA = Path(__file__).parents[2] / "docs" / "verify-report.schema.json"


@pytest.fixture(scope="session")
def report_validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="session", autouse=True)
def _reports_are_as_documented(report_validator: jsonschema.Draft202012Validator) -> Iterator[None]:
    judge = run.judge_bundle

    def checked(*arguments: Any, **options: Any) -> Report:
        report = judge(*arguments, **options)
        text = json.dumps(report_json(report), allow_nan=False)
        report_validator.validate(json.loads(text))
        assert report.bundle.name.replace("_", "\\_") in report_markdown(report)
        assert report_html(report).rstrip().endswith("</html>")
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "judge_bundle", checked)
        yield

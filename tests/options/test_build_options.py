"""Build options: how values may be written, and what is said about a bad one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from doge_deploy.errors import UsageError
from doge_deploy.options.build import BuildOptions, Range, load_build_options, parse_capability

CONFIGS = sorted((Path(__file__).parents[2] / "export_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_build_section_of_every_export_config_loads(path: Path) -> None:
    assert load_build_options(path, {}, [])


@pytest.mark.parametrize("text", ["8.9", "89", "sm89", "sm_89", "SM89", " 8.9 "])
def test_spellings_of_a_capability(text: str) -> None:
    assert parse_capability(text) == "8.9"


def test_capabilities_are_sorted_by_number() -> None:
    assert BuildOptions(compute_capabilities=(12.0, "8.6", 89, "sm89")).compute_capabilities == ("8.6", "8.9", "12.0")  # type: ignore[arg-type]


RANGES = {"one": 8, "list": [1, 2, 8], "text": "1,2,8", "mapping": {"min": 1, "opt": 2, "max": 8}, "digits": "8"}


@pytest.mark.parametrize("given", RANGES.values(), ids=RANGES.keys())
def test_spellings_of_a_range(given: Any) -> None:
    found = BuildOptions(batch_size=given).batch_size
    assert found in (Range(min=8, opt=8, max=8), Range(min=1, opt=2, max=8))


def test_options_survive_a_manifest() -> None:
    options = BuildOptions(batch_size=[1, 2, 8], compute_capabilities=["8.9"], profiles="separate")  # type: ignore[arg-type]
    assert BuildOptions.model_validate(options.model_dump(mode="json")) == options


def test_a_range_reads_as_it_is_written_in_yaml() -> None:
    text = str(Range(min=1, opt=1, max=8))
    assert BuildOptions(batch_size=yaml.safe_load(text)).batch_size == Range(min=1, opt=1, max=8)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("target=tpu", "target='tpu': must be one of trt-rtx, trt"),
        ("batch_size=0", "batch_size=0: must be a whole number >= 1, or three"),
        ("batch_size=4,2,1", "batch_size='4,2,1': must be a whole number"),
        ("batch_size=[1, 2]", "batch_size=[1, 2]: must be"),
        ("batch_size=true", "batch_size=True: must be"),
        ("compute_capabilities=[ada]", "compute_capabilities=['ada']: must be a list of compute capabilities"),
        ("workspace_mib=1.5", "workspace_mib=1.5: must be"),
        ("verbosit=none", "unknown key 'verbosit' (did you mean 'verbosity'?)"),
    ],
    ids=lambda value: value.split(":")[0] if "=" in value and " " not in value else "",
)
def test_bad_assignment(assignment: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_build_options(None, {}, [assignment])
    assert words in str(caught.value)

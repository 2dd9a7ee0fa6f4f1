"""Engine records: they survive a manifest, and answer which profile takes a call."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from engine_stand_ins import made_up_record as record
from engine_stand_ins import write_engine

from doge_deploy.bundle.consistency import read_manifest
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.errors import UsageError


def test_a_record_survives_a_manifest(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    built = write_engine(path)
    assert open_bundle(path).engine(Path(built.directory).name) == built


def test_an_older_manifest_has_no_engines(tiny_bundle: Path) -> None:
    data = json.loads((tiny_bundle / "manifest.json").read_text())
    del data["engines"]
    findings: list[str] = []
    read = read_manifest(data, findings)
    assert read is not None and read.engines == {} and not findings


def test_an_engine_is_found_by_name_or_because_it_is_the_only_one(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    one = Bundle(bundle.path, replace(bundle.manifest, engines={"a": record()}))
    two = Bundle(bundle.path, replace(bundle.manifest, engines={"a": record(), "b": record(dtype="bf16")}))
    assert one.engine() == one.engine("a") == two.engine("a")
    with pytest.raises(UsageError, match="several engines, name one of them; it holds: a, b"):
        two.engine()
    with pytest.raises(UsageError, match="no engine c; it holds: a"):
        one.engine("c")
    with pytest.raises(UsageError, match="no engine; it holds: none; make one with `doge-deploy build`"):
        bundle.engine()


def test_the_narrowest_profile_takes_a_call() -> None:
    made = record()
    assert made.profile_for(batch_size=1, sequence_length=1) == 1
    assert made.profile_for(batch_size=1, sequence_length=7) == 0
    assert made.profile_for(batch_size=4, sequence_length=1) == 1
    assert made.profile_for(batch_size=4, sequence_length=7) is None
    assert made.profile_for(batch_size=1, sequence_length=65) is None


def test_shapes_of_a_profile() -> None:
    made = record()
    assert made.profiles[0].shape(made.tensor("input_ids"), "max") == (1, 64)
    assert made.profiles[1].shape(made.tensor("logits"), "max") == (4, 1, 256)
    with pytest.raises(KeyError):
        made.tensor("logit")

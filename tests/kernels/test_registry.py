"""Plugins through entry points: ours, someone else's, and broken ones."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.kernels import registry
from doge_deploy.kernels.registry import installed, make_registry
from doge_deploy.kernels.spec import OperatorPlugin
from doge_plugins.cdmoe.spec import PLUGIN as CDMOE


def test_our_operators_are_installed() -> None:
    found = installed()
    assert found.operator("doge", "CDMoE") is CDMOE
    assert found.origins["doge", "CDMoE"].startswith("doge-deploy ")
    assert found.spec("doge::CDMoERoute") is CDMOE.specs[0]
    assert found.spec("doge::Nothing") is None
    assert found.operator("other", "CDMoE") is None


def test_two_plugins_of_one_operator_are_refused() -> None:
    with pytest.raises(UsageError, match="doge::CDMoE has two plugins, from ours and from theirs; uninstall one"):
        make_registry([(CDMOE, "ours"), (CDMOE, "theirs")])


def test_two_kernels_of_one_name_are_refused() -> None:
    other = OperatorPlugin("Other", CDMOE.specs[:1], CDMOE.chain)
    with pytest.raises(UsageError, match="plugin doge::CDMoERoute is brought twice, by ours and by theirs"):
        make_registry([(CDMOE, "ours"), (other, "theirs")])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:PLUGIN", "plugin 'mine' of no_such_module:PLUGIN cannot be loaded"),
        ("doge_plugins.cdmoe.spec:SPECS", "doge_plugins.cdmoe.spec:SPECS is tuple, must be an OperatorPlugin"),
    ],
    ids=["absent", "of-another-type"],
)
def test_a_broken_plugin_is_named(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("mine", value, group)])
    with pytest.raises(MissingDependencyError, match=message):
        installed()

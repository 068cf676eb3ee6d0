"""The versions that a run writes down."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from reeltune.core import versions
from reeltune.memory import flash_4


def test_a_package_used_from_its_source_has_none(monkeypatch):
    found = versions.versions()
    named = ["reeltune", *versions.LIBRARIES]
    assert found["torch"] == version("torch") and [*found][: len(named)] == named

    def of_others(name):
        if name == "reeltune":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(versions, "version", of_others)
    assert versions.versions() == found | {"reeltune": "not installed"}


@pytest.mark.parametrize("there", [False, True])
def test_the_package_of_attention_is_told_where_it_is_installed(there, monkeypatch):
    """Whose bits a run has then, and which all of its processes must have."""

    def own(name):
        if name != flash_4.PACKAGE:
            return version(name)
        if there:
            return "4.0.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", own)
    assert versions.versions().get(flash_4.PACKAGE) == flash_4.installed() == ("4.0.0" if there else None)

"""The versions that a run writes down."""

from importlib.metadata import PackageNotFoundError, version

from reeltune.core import versions


def test_a_package_used_from_its_source_has_none(monkeypatch):
    installed = versions.versions()
    assert installed["torch"] == version("torch") and list(installed) == ["reeltune", *versions.LIBRARIES]

    def of_others(name):
        if name == "reeltune":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(versions, "version", of_others)
    assert versions.versions() == installed | {"reeltune": "not installed"}

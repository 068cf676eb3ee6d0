"""The versions that a run writes down."""

from importlib.metadata import PackageNotFoundError, version

from reeltune.run import folder


def test_a_package_used_from_its_source_has_none(monkeypatch):
    installed = folder.versions()
    assert installed["torch"] == version("torch") and list(installed) == ["reeltune", *folder.LIBRARIES]

    def of_others(name):
        if name == "reeltune":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(folder, "version", of_others)
    assert folder.versions() == installed | {"reeltune": "not installed"}

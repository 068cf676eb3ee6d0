"""Tiny checkpoints of Wan2.1-Fun, and the notices of their loading; and no reports."""

import shutil

import pytest

from reeltune import families
from reeltune.families import tensor_files
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.reports import reports  # noqa: F401 - for all tests here


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory):
    """variant -> folder, laid out once."""
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = tiny_checkpoint(tmp_path_factory.mktemp(variant.replace(".", "_")), variant)
        return made[variant]

    return get


@pytest.fixture(scope="session")
def loaded_wan(tiny_wan):
    """variant -> (family, parts), loaded once; tests leave the weights as they are."""
    made = {}

    def get(variant):
        if variant not in made:
            family = families.find(tiny_wan(variant))
            made[variant] = family, family.load(tiny_wan(variant))
        return made[variant]

    return get


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "control_t2v", "control_t2v")


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture
def notices(caplog):
    tensor_files.notice.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name == tensor_files.notices.name]

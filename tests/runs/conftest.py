"""Fixtures of the tests of the cache; and no reports."""

import pytest

from tests.runs.caching import STEPS
from tests.runs.reports import reports  # noqa: F401 - for all tests here
from tests.runs.small_run import recipe


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    return tmp_path_factory.mktemp("index")


@pytest.fixture
def run(data, index, toy, tmp_path):
    """A recipe whose folder is new, and whose data is measured once for all tests."""

    def make(name, model=toy, data=data, **changes):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        if not (out / "index").is_symlink():
            (out / "index").symlink_to(index)
        settings = {"max_train_steps": STEPS, "checkpointing_steps": 100, "cache_variants": 2, "text_drop_ratio": 0.4}
        return recipe(model, data, out, **settings | changes)

    return make

"""Fixtures that find what tests read beside the project: goldens, media and broken inputs."""

from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--goldens", default=str(BESIDE / "goldens"), help="folder of golden files to compare with")


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        pytest.skip(f"no {what} at {path}; give --goldens DIR")
    return path


def pytest_generate_tests(metafunc):
    """Tests that take a `pair`, `any_checkpoint` or `one_of_a_family` run over every family; those that take a `file`
    over the `golden_files` of their module, if it has them."""
    if "file" in metafunc.fixturenames and hasattr(metafunc.module, "golden_files"):
        files = metafunc.module.golden_files(Path(metafunc.config.getoption("--goldens")).resolve())
        names = [f"{path.parent.name}/{path.stem}" for path in files]
        metafunc.parametrize("file", files or [None], ids=names or ["absent"])
    for name in ("pair", "any_checkpoint", "one_of_a_family"):
        if name in metafunc.fixturenames:
            from tests.families.every_family import (  # here: tests without networks need not wait for their libraries
                one_each,
                pairs,
            )

            goldens = Path(metafunc.config.getoption("--goldens")).resolve()
            found = one_each(goldens) if name == "one_of_a_family" else pairs(goldens, modes=name == "pair")
            metafunc.parametrize(name, found, scope="module")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips a test whose marker `golden` names files that this set of goldens lacks."""
    goldens = Path(item.config.getoption("--goldens")).resolve()
    for marker in item.iter_markers("golden"):
        missing = [needed for needed in marker.args if not any(goldens.glob(needed))]
        if missing:
            pytest.skip(f"no {' and no '.join(missing)} at {goldens}; give --goldens DIR")


@pytest.fixture(scope="session")
def goldens(request) -> Path:
    return _folder(Path(request.config.getoption("--goldens")).resolve(), "golden files")


def _beside(request, name: str) -> Path:
    """`name` beside the goldens, else beside the repository."""
    path = Path(request.config.getoption("--goldens")).resolve().parent / name
    return _folder(path if path.is_dir() else BESIDE / name, name)


@pytest.fixture(scope="session")
def media(request) -> Path:
    return _beside(request, "media")


@pytest.fixture(scope="session")
def bad_inputs(request) -> Path:
    return _beside(request, "bad_inputs")


@pytest.fixture(scope="session")
def cases(request) -> Path:
    """Inputs that were once answered wrongly."""
    return _beside(request, "cases")


@pytest.fixture(scope="session")
def seeds(request) -> Path:
    """The guides."""
    return _beside(request, "seeds")

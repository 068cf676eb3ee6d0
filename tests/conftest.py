"""Fixtures that find what tests read: goldens, media, broken inputs and the guides' commands.

Each is taken from beside the folder of `--goldens`, else from beside the repository, else from this folder, which
holds a smaller set of each; media are made.
"""

import gc
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from reeltune.core.imports import lean_imports
from tests.flushing import flush_nothing

HERE = Path(__file__).resolve().parent
BESIDE = HERE.parents[1] / "shared"
GOLDENS = BESIDE / "goldens" if (BESIDE / "goldens").is_dir() else HERE / "goldens"
ONCE = {"first_by_family": ["family"], "first_by_network": ["network"], "each_once": ["network", "mode"]}
LEFT_BEHIND = pytest.StashKey[set[str]]()


def pytest_addoption(parser):
    parser.addoption("--goldens", default=str(GOLDENS), help="folder of golden files to compare with")


def pytest_configure(config):
    """What is remembered for all runs of a user is not this user's, nor that of another session; disks are not waited
    for; and garbage among all that is alive is looked for a tenth as often: it took 5 % of the time."""
    flush_nothing()
    gc.set_threshold(*gc.get_threshold()[:2], 100)
    folder = tempfile.TemporaryDirectory(prefix="user-cache-")
    config.add_cleanup(folder.cleanup)
    os.environ["XDG_CACHE_HOME"] = folder.name


def untracked() -> set[str]:
    """Files of the working folder that git neither knows nor ignores; none outside a repository."""
    command = ["git", "-C", str(HERE.parent), "ls-files", "--others", "--exclude-standard"]
    return set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines())


def pytest_sessionstart(session):
    session.config.stash[LEFT_BEHIND] = untracked()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """No test writes into the working folder."""
    if not hasattr(session.config, "workerinput"):
        left = sorted(untracked() - session.config.stash[LEFT_BEHIND])
        if left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            reporter = session.config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line(f"\ntests left files in the working folder: {', '.join(left)}", red=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Libraries and thousands of tests stay to the end: no garbage is looked for in them, now or later."""
    with lean_imports():
        return (yield)


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


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(config, items):
    """Of tests that run over families, those of the marker `family` stay with theirs; of those of `quick_by_family` the
    first checkpoint and mode of each family, or of those that it names, stay quick; those of `first_by_family` and of
    `first_by_network` run over the first alone, those of `each_once` over what brings a network or a mode."""
    others, first, alone = set(), {}, {}
    for item in items:
        quick = item.get_closest_marker("quick_by_family")
        if quick:
            params = item.callspec.params
            pair = params.get("pair") or params["any_checkpoint"]
            is_first = first.setdefault((item.path, pair.family), pair) == pair
            if not is_first or (quick.args and pair.family not in quick.args):
                item.add_marker("slow")
        if over := [marker for marker in ONCE if item.get_closest_marker(marker)]:
            params = item.callspec.params
            pair = params.get("pair") or params["any_checkpoint"]
            brings = [(item.path, pair.family, what, getattr(pair, what)) for what in ONCE[over[0]]]
            if all([alone.setdefault(what, pair) != pair for what in brings]):
                others.add(item)
        family = item.get_closest_marker("family")
        if family and item.callspec.params["one_of_a_family"].family not in family.args:
            others.add(item)
    config.hook.pytest_deselected(items=[item for item in items if item in others])
    items[:] = [item for item in items if item not in others]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips a test whose marker `golden` names files that this set of goldens lacks."""
    goldens = Path(item.config.getoption("--goldens")).resolve()
    for marker in item.iter_markers("golden"):
        missing = [needed for needed in marker.args if not any(goldens.glob(needed))]
        if missing:
            pytest.skip(f"no {' and no '.join(missing)} at {goldens}; give --goldens=DIR")


@pytest.fixture(scope="session")
def goldens(request) -> Path:
    folder = Path(request.config.getoption("--goldens")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no golden files at {folder}; give --goldens=DIR")
    return folder


def _beside(request, name: str) -> Path | None:
    """`name` beside the goldens, else beside the repository."""
    beside = Path(request.config.getoption("--goldens")).resolve().parent
    return next((folder / name for folder in (beside, BESIDE) if (folder / name).is_dir()), None)


@pytest.fixture(scope="session")
def media(request, tmp_path_factory) -> Path:
    if (found := _beside(request, "media")) is not None:
        return found
    from tests.runs.small_run import data_set  # here: tests without clips need not wait for its libraries

    return data_set(tmp_path_factory.mktemp("media"), clips=5, stills=2, frames=29)


@pytest.fixture(scope="session")
def bad_inputs(request) -> Path:
    return _beside(request, "bad_inputs") or HERE / "bad_inputs"


@pytest.fixture(scope="session")
def cases(request) -> Path:
    """Inputs that were once answered wrongly."""
    return _beside(request, "cases") or pytest.skip(f"no cases beside the goldens or at {BESIDE}")


@pytest.fixture(scope="session")
def seeds(request) -> Path:
    """The guides."""
    return _beside(request, "seeds") or HERE / "guides"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Small clips with controls, for all tests that leave them as they are."""
    from tests.runs.small_run import data_set

    return data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def measured_here(monkeypatch) -> None:
    """Files are measured in this process."""
    from reeltune.data import measuring  # here: tests without clips need not wait for its libraries
    from tests.runs.small_run import measure_here

    monkeypatch.setattr(measuring, "_run", measure_here)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A checkpoint of the toy family."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.json").write_text("{}")
    return folder

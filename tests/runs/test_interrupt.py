"""Ctrl-C: the first one asks for an end, the second is one, whatever hangs, and no process stays."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest

from reeltune.config.parse import flat
from reeltune.core import interrupt
from reeltune.core.files import whole_folder
from reeltune.core.guarded import guarded
from reeltune.core.interrupt import second_leaves, terminates
from tests.distributed.processes import FORKS, wait
from tests.runs import hung


def is_there(number: int) -> bool:
    """A process that has ended but that nobody has asked for is not."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def hang(tmp_path):
    """Starts a command and returns it when it hangs, with the numbers of the processes that do."""
    (tmp_path / hung.SIGNS).mkdir()
    os.mkfifo(tmp_path / "fifo")
    started = []

    def start(place, argv):
        process = FORKS.Process(target=hung.run, args=(argv, tmp_path, place))
        process.start()
        started.append(process)
        signs = tmp_path / hung.SIGNS
        assert wait(lambda: any(signs.iterdir()) or not process.is_alive(), lambda: err(tmp_path))
        assert process.is_alive(), err(tmp_path)
        return process, [int(path.name) for path in signs.iterdir()]

    yield start
    for process in started:
        process.kill()


def err(folder) -> str:
    file = folder / "err"
    return file.read_text() if file.is_file() else ""


def words(given):
    """The flags of a recipe."""
    flags = []
    for name, value in flat(given).items():
        if value not in (None, (), ""):
            flags += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flags


def press(process, times):
    """As often as it takes: two at once may come as one."""
    pressed = 0

    def gone():
        nonlocal pressed
        process.join(0.1)
        if process.is_alive() and pressed < times:
            os.killpg(process.pid, signal.SIGINT)
            pressed += 1
        return not process.is_alive()

    return gone


def asleep(_):
    time.sleep(3600)


@pytest.mark.parametrize(("command", "workers"), [("train", 0), ("train", 1), ("cache", 1)])
def test_the_second_leaves_a_hung_reader(command, workers, run, hang, tmp_path):
    changes = {"dataloader_num_workers": workers, "validation_steps": None, "held_out_share": 0}
    flags = words(run("run", **changes)) + (["--cache_folder", str(tmp_path / "cache")] if command == "cache" else [])
    process, hanging = hang("read", [command, *flags])
    assert (process.pid in hanging) is (workers == 0)
    os.killpg(process.pid, signal.SIGINT)
    assert wait(lambda: "Ctrl-C again leaves at once" in err(tmp_path), lambda: err(tmp_path))
    asked = "ends after this step, with a checkpoint; " if command == "train" else "ends after this entry; "
    assert asked in err(tmp_path) and all(map(is_there, [process.pid, *hanging]))
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert set(hanging) <= {process.pid, *children}
    os.killpg(process.pid, signal.SIGINT)
    assert wait(lambda: not process.is_alive(), lambda: None)
    assert process.exitcode == 130
    assert wait(lambda: not any(map(is_there, [*hanging, *children])), lambda: None)
    assert "Traceback" not in err(tmp_path)


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("train", "reeltune.families.spec:Family:encode"),
        ("train", "reeltune.training.turns:load_parts"),
        ("sample", "reeltune.families.spec:Family:encode"),
        ("plan", "reeltune.estimate.main:gather"),
        ("check", "reeltune.estimate.check:gather"),
        ("export", "reeltune.export.main:export"),
    ],
)
def test_the_second_leaves_what_python_cannot_interrupt(command, place, run, hang, tmp_path, data):
    flags = words(run("run"))
    if command == "sample":
        flags += ["--validation_prompts", "a cat", "--validation_paths", str(data / "control/0.mp4")]
    process, _ = hang(place, [command, *([str(tmp_path), str(tmp_path / "out")] if command == "export" else flags)])
    assert wait(press(process, 20), lambda: None)
    assert process.exitcode == 130


def under_way(folder, hang):
    def act():
        with whole_folder(folder / "out") as beside:
            (beside / "half").touch()
            (folder / "begun").touch()
            hang(folder)
        return 0

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    interrupt.GRACE_SECONDS = 1.0
    sys.exit(guarded(act))


@pytest.mark.parametrize(("hang", "left"), [(asleep, []), (hung.in_arithmetic, [".out.partial"])])
def test_sigterm_removes_what_was_begun_if_python_may(hang, left, tmp_path):
    process = FORKS.Process(target=under_way, args=(tmp_path, hang))
    process.start()
    assert wait(lambda: (tmp_path / "begun").exists() or not process.is_alive(), lambda: None)
    process.terminate()
    assert wait(lambda: not process.is_alive(), lambda: None)
    assert process.exitcode == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "begun"]


@pytest.fixture
def ctrl_c_raises():
    """Also where a shell started the tests in the background, and so had Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_nothing_stays_behind(ctrl_c_raises):
    before = signal.getsignal(signal.SIGINT), threading.active_count(), len(os.listdir("/dev/fd"))
    with second_leaves(), terminates():
        assert threading.active_count() == before[1] + 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), threading.active_count(), len(os.listdir("/dev/fd"))) == before
    assert signal.set_wakeup_fd(-1) == -1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_forked_process_does_not_end_its_parent(ctrl_c_raises):
    with second_leaves(), terminates():
        for _ in range(2):
            if not (child := os.fork()):
                with suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
                os._exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)
            assert os.waitpid(child, 0)[1] == 0


def test_a_thread_may_run_a_command():
    done = []
    thread = threading.Thread(target=lambda: done.append(second_leaves().__enter__()))
    thread.start()
    thread.join()
    assert done == [None]

"""What the system does not give to reading processes is said, and not waited for."""

import errno
import os
import resource

import pytest
import torch

from reeltune.core.errors import UserError
from reeltune.core.types import Progress
from reeltune.data.loader import stream
from tests.unit import test_loader
from tests.unit.test_loader import reader, rows

folder = test_loader.folder


def test_too_few_open_files_are_refused_and_not_waited_for(folder, monkeypatch):
    """Without a file to receive it by, a batch would be waited for without end."""
    limits = [20, 20]
    monkeypatch.setattr("resource.getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr("resource.setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    with pytest.raises(UserError, match=r"need about \d+ open files, and the system allows 20; raise that limit"):
        next(stream(reader(rows(folder)), Progress(), workers=2))
    limits[1] = 4096  # what may be raised is raised
    next(stream(reader(rows(folder)), Progress(), workers=1))
    assert 20 < limits[0] < 4096


@pytest.fixture
def little_shared_memory():
    """1,000 bytes of it for each tensor of the processes started from here on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_too_little_shared_memory_is_said_and_not_waited_for(folder, little_shared_memory):
    with pytest.raises(UserError, match=r"hand them over in /dev/shm, whose .* MB are too little .* --shm-size"):
        next(stream(reader(rows(folder)), Progress(), workers=1))


def test_no_shared_memory_at_all_is_said(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", full)
    with pytest.raises(UserError, match=r"/dev/shm, whose .* MB are too little \(\[Errno 28\]"):
        next(stream(reader(rows(folder)), Progress(), workers=1))

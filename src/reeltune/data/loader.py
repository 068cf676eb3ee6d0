"""Draw -> Sample -> Batch. Workers open files; what they open was decided by the plan."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reeltune.core.errors import UserError
from reeltune.core.rng import dice
from reeltune.core.types import Batch, Draw, Encoded, MaskLaw, Progress, Record, Sample
from reeltune.data.camera import CameraError, rays, read_poses, resample
from reeltune.data.findings import require_same
from reeltune.data.masks import draw_mask
from reeltune.data.media import MediaError, frames_on_show, read_frames
from reeltune.data.plan import Plan, refuse_empty

FILES_A_WORKER = 20  # open at once: pipes, and two batches of shared tensors on their way
ATTEMPTS = 8  # files tried in one place of a batch before the run is stopped
T = TypeVar("T")
Place = tuple[int, int, int, int]  # epoch, micro-step, rank, world


class Reader(Dataset[Batch]):
    """reader[epoch, k, rank, world] -> the rank's share of micro-step k.

    `plan` gives an epoch's plan (a partial of Plan, so that it can be sent to worker processes). `drop` is condition
    name -> share of samples it is blanked in; "text" is added to it. `needs`: which of "control", "camera" and "mask"
    a sample has; the records have the paths for them.
    """

    def __init__(
        self,
        records: Sequence[Record],
        plan: Callable[[int], Plan],
        *,
        group: int,
        drop: Mapping[str, float],
        text_drop_ratio: float,
        needs: frozenset[str] = frozenset(),
        mask_law: MaskLaw | None = None,
    ):
        self.records = records
        self.group = group
        self.drop = {**drop, "text": text_drop_ratio}
        self.needs = needs
        self.mask_law = mask_law or MaskLaw()
        self._make_plan = plan
        self._plan: tuple[int, Plan] | None = None
        self._encoded: Callable[[Record, Draw, Mapping[str, bool]], Encoded] | None = None
        self._with_pixels = True

    def from_cache(
        self, encoded: Callable[[Record, Draw, Mapping[str, bool]], Encoded], *, with_pixels: bool = False
    ) -> Reader:
        """The same reader, whose samples are encoded already: by (record, draw, what is kept), which may raise
        MediaError. Files are opened only for pixels to look at.
        """
        reader = copy(self)
        reader._encoded, reader._with_pixels = encoded, with_pixels
        return reader

    def plan(self, epoch: int) -> Plan:
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, self._make_plan(epoch)
        return self._plan[1]

    def __getitem__(self, place: Place) -> Batch:
        """Raises UserError where no file can be read."""
        epoch, k, rank, world = place
        share = self.group // world
        plan = self.plan(epoch)
        draws = plan.share(k, rank * share, (rank + 1) * share)
        return collate([self._read(plan, draw, k, rank * share + i) for i, draw in enumerate(draws)])

    def _read(self, plan: Plan, draw: Draw, k: int, position: int) -> Sample:
        """The draw, or the first of its stand-ins that can be read."""
        failures: list[tuple[int, str]] = []
        while True:
            try:
                return self.open(draw, tuple(failures))
            except (MediaError, CameraError) as error:
                failures.append((draw.record, str(error)))
            try:
                if len(failures) == ATTEMPTS:
                    raise LookupError(f"{ATTEMPTS} files were tried")
                draw = plan.stand_in(k, position, len(failures))
            except LookupError as error:
                broken = [f"{self.records[record].path} {reason}" for record, reason in failures]
                raise UserError(f"train_data_meta: files that the scan found sound ({error})", broken) from error

    def open(self, draw: Draw, failures: tuple[tuple[int, str], ...] = ()) -> Sample:
        """Raises MediaError or CameraError."""
        record = self.records[draw.record]
        sample = Sample(
            draw=draw,
            text=record.text,
            pixels_FCHW=torch.empty((0, 3, *draw.shape[1:]), dtype=torch.uint8),
            keep={name: dice(draw.seed, "keep", name).random() >= p for name, p in self.drop.items()},
            failures=failures,
        )
        if self._encoded is not None:
            sample.encoded = self._encoded(record, draw, sample.keep)
        if not self._with_pixels:
            return sample
        require_same(record.path, record.content)
        # Of a clip of uneven rate they are chosen by its own time stamps; what accompanies it goes by frame.
        frames: Sequence[int] = draw.frames
        if draw.rate is not None:
            frames = frames_on_show(record.path, frames, record.fps, draw.rate)
        sample.pixels_FCHW = torch.from_numpy(read_frames(record.path, frames, draw.crop, draw.shape))
        if "control" in self.needs:
            sample.control_FCHW = torch.from_numpy(self._control(record, draw, frames))
        if "camera" in self.needs:
            sample.camera_FCHW = torch.from_numpy(self._camera(record, draw, frames))
        if "mask" in self.needs:
            sample.mask_FHW = torch.from_numpy(draw_mask(draw.seen_seed, draw.shape, self.mask_law))
        return sample

    def _control(self, record: Record, draw: Draw, frames: Sequence[int]) -> np.ndarray:
        assert record.control_path is not None
        try:
            require_same(record.control_path, record.control_content)
            return read_frames(record.control_path, frames, draw.crop, draw.shape)
        except MediaError as error:
            raise MediaError(f"has a control that {error}: {record.control_path}") from error

    def _camera(self, record: Record, draw: Draw, frames: Sequence[int]) -> np.ndarray:
        """Rays of the whole resized picture, cut as it is."""
        assert record.camera_path is not None
        try:
            require_same(record.camera_path, record.control_content)
            rows = resample(read_poses(record.camera_path), record.frames, frames)
            rays_FHWC = rays(rows, draw.crop.height, draw.crop.width)
        except CameraError as error:
            raise CameraError(f"has a camera path that is bad at {error}: {record.camera_path}") from error
        except MediaError as error:
            raise MediaError(f"has a camera path that {error}: {record.camera_path}") from error
        crop, shape = draw.crop, draw.shape
        window = rays_FHWC[:, crop.top : crop.top + shape.height, crop.left : crop.left + shape.width]
        return np.ascontiguousarray(window.transpose(0, 3, 1, 2))


def collate(samples: Sequence[Sample]) -> Batch:
    def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        return present[0][None] if len(present) == 1 else torch.stack(present)  # one clip is not copied

    pixels_BFCHW = stacked([sample.pixels_FCHW for sample in samples])
    assert pixels_BFCHW is not None
    encoded = [sample.encoded for sample in samples if sample.encoded is not None]
    return Batch(
        draws=[sample.draw for sample in samples],
        text=[sample.text for sample in samples],
        pixels_BFCHW=pixels_BFCHW,
        control_BFCHW=stacked([sample.control_FCHW for sample in samples]),
        camera_BFCHW=stacked([sample.camera_FCHW for sample in samples]),
        mask_BFHW=stacked([sample.mask_FHW for sample in samples]),
        ref_frame_B=torch.tensor([sample.draw.ref_frame for sample in samples]),
        keep={name: torch.tensor([sample.keep[name] for sample in samples]) for name in samples[0].keep},
        failures=tuple(failure for sample in samples for failure in sample.failures),
        encoded=joined(encoded) if encoded else None,
    )


def joined(samples: Sequence[Encoded]) -> Encoded:
    """One batch of several, copied even if there is one: a mapped file's tensors lie at odd addresses."""
    tables = [sample.tensors() for sample in samples]
    return Encoded.of({name: torch.cat([table[name] for table in tables]) for name in tables[0]})


def stream(
    reader: Reader, start: Progress, *, workers: int, rank: int = 0, world: int = 1, passes: int = 1
) -> Iterator[tuple[Batch, int, int]]:
    """(batch, epoch, cursor after it), from `start` on, over the epochs, for ever: the same for any number of workers.

    passes: batches into which this rank's share of a micro-step is cut; they have its epoch and cursor alike.

    Raises UserError where no record can be used, where no file can be read, and where a worker process dies.
    """
    plan = reader.plan(start.epoch)
    refuse_empty(plan, reader.records)
    places = _Places(start, plan.micro_steps_before, rank, world, passes)
    for (epoch, k, _, _), batch in zip(places, read_ahead(_Handed(reader), places, workers), strict=False):
        if isinstance(batch, UserError):
            raise batch
        yield batch, epoch, k + 1


def read_ahead(data: Dataset[T], places: Iterable[Any], workers: int) -> Iterator[T]:
    """data[place] of each place, in order, read by so many processes; tensors in page-locked memory for a GPU.

    Raises UserError where a process dies, and where so many may not have the files open or the shared memory that they
    need.
    """
    if workers:
        _allow_open_files(FILES_A_WORKER * workers)
    handler, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # run/machine.py says it, once
        loader: DataLoader[T | _NoSharedMemory] = DataLoader(
            _InSharedMemory(data) if workers else data,
            batch_size=None,
            sampler=places,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        try:
            batches = iter(loader)  # one iterator over all epochs: the workers persist
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise _NoSharedMemory(str(error)).told() from error
    started = [process for process in multiprocessing.active_children() if process not in others]
    if threading.current_thread() is threading.main_thread():
        # DataLoader's own handler would raise a dead worker's error in the middle of a training step; it is found here.
        signal.signal(signal.SIGCHLD, handler)
    try:
        for batch in batches:
            if isinstance(batch, _NoSharedMemory):
                raise batch.told()
            yield batch
        return
    except (RuntimeError, EOFError, OSError) as error:
        if not workers or str(error).startswith("Caught "):  # raised by the reader itself
            raise
        death = str(error) or type(error).__name__
    finally:
        del batches  # now: as part of a reference cycle its workers would not be told to end
        for process in started:
            process.kill()  # one that hangs in a file has not heard it, and would be waited for without end
    raise UserError(
        "dataloader_num_workers",
        f"a process that reads clips died ({death}); it may have run out of memory: "
        "give fewer, or 0 to read in the training process",
    )


def _allow_open_files(more: int) -> None:
    """Lets this process open so many files more: without them a batch would be lost, and be waited for without end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + more
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            "dataloader_num_workers",
            f"processes that read clips need about {needed} open files, and the system allows {hard}; raise that limit "
            "(ulimit -n), give fewer, or 0 to read in the training process",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _NoSharedMemory:
    """What is handed over in place of a batch for which no shared memory is left."""

    def __init__(self, reason: str):
        self.reason = reason.splitlines()[0]

    def told(self) -> UserError:
        room = os.statvfs("/dev/shm")
        megabytes = room.f_blocks * room.f_frsize / 1e6
        return UserError(
            "dataloader_num_workers",
            f"processes that read clips hand them over in /dev/shm, whose {megabytes:,.1f} MB "
            f"are too little ({self.reason}); enlarge it (docker run --shm-size 8g), give fewer, or 0 to read in the "
            "training process",
        )


class _InSharedMemory(Dataset[T | _NoSharedMemory]):
    """What is handed over is put into shared memory here: DataLoader does so in a thread whose error reaches nobody,
    and the batch would be waited for without end."""

    def __init__(self, data: Dataset[T]):
        self._data = data

    def __getitem__(self, place: Any) -> T | _NoSharedMemory:
        item = self._data[place]
        try:
            for tensor in _tensors(item):
                tensor.share_memory_()
        except RuntimeError as full:
            return _NoSharedMemory(str(full))
        return item


def _tensors(thing: Any) -> Iterator[Tensor]:
    """All within it."""
    if isinstance(thing, Tensor):
        yield thing
    parts = thing if isinstance(thing, list | tuple) else ()
    if isinstance(thing, dict):
        parts = thing.values()
    elif is_dataclass(thing):
        parts = (getattr(thing, each.name) for each in fields(thing))
    for part in parts:
        yield from _tensors(part)


class _Handed(Dataset[Batch | UserError]):
    """The reader, with a UserError handed over like a batch: DataLoader would make a RuntimeError of it."""

    def __init__(self, reader: Reader):
        self._reader = reader

    def __getitem__(self, place: Place) -> Batch | UserError:
        try:
            return self._reader[place]
        except UserError as error:
            return error


class _Places:
    """Micro-steps in order, epoch after epoch. micro_steps_before: epoch -> how many all before it have."""

    def __init__(self, start: Progress, micro_steps_before: Callable[[int], int], rank: int, world: int, passes: int):
        self._epoch, self._cursor, self._before = start.epoch, start.cursor, micro_steps_before
        self._rank, self._world, self._passes = rank, world, passes

    def __iter__(self) -> Iterator[Place]:
        epoch, cursor = self._epoch, self._cursor
        while True:
            for k in range(cursor, self._before(epoch + 1) - self._before(epoch)):
                for i in range(self._passes):  # as if there were so many more ranks
                    yield epoch, k, self._rank * self._passes + i, self._world * self._passes
            epoch, cursor = epoch + 1, 0


def _start_worker(_: int) -> None:
    """The training process alone answers Ctrl-C and the first SIGTERM, which reach the whole process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))

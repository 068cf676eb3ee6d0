"""`reeltune control verify` and `reeltune control prune`.  (no torch)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from reeltune.control.entries import FOLDER
from reeltune.control.kind import Kind
from reeltune.control.records import Made, Records, claims, size_of
from reeltune.control.stage import Maker, Order, jobs_of
from reeltune.core.errors import UserError
from reeltune.core.files import writing


def verify(order: Order) -> str:
    """Reads every byte of the controls that a list asks for, and holds the clips against what they were made from.

    Raises UserError for what is not as it was written; a damaged control is set aside, so that it is made again.
    """
    maker, problems, whole, left_out = Maker(order, order.opened()), [], 0, 0
    jobs = jobs_of(order)
    for job in jobs:
        made, key = maker.records.get(job.kind.name, job.control), maker.key(job)
        control = order.data_dir / job.control
        if key is None:
            problems.append(f"{job.clip} {maker.unread[job]}")
        elif made is None or not made.done:
            problems.append(f"{job.control} is missing")
        elif made.key != key:
            problems.append(f"{job.control} was made of another clip, or by another detector")
        elif made.reason:
            left_out += 1
        elif size_of(control) < 0:
            problems.append(f"{job.control} is missing")
        elif not maker.records.is_as_written(made):
            if maker.records.get(job.kind.name, job.control) == made:
                maker.records.set_aside(job.control)
                problems.append(f"{job.control} is not as it was written, and is set aside")
            else:
                problems.append(f"{job.control} is being made again by another process")
        else:
            whole += 1
    if problems:
        raise UserError(str(order.data_dir / FOLDER), [*problems, "run reeltune control, which makes them again"])
    return f"{whole} controls, all whole; {left_out} clips were left out"


def prune(data_dir: Path, order: Order, kind: Kind) -> str:
    """Deletes the controls of a kind that a list does not ask for, with what is known of them, and nothing that
    `reeltune control` has not made. Raises UserError while a process makes controls there."""
    asked = {job.control for job in jobs_of(order) if job.kind.name == kind.name}
    records, freed_bytes, count = Records(data_dir), 0, 0
    with claims(data_dir) as held, writing(data_dir / FOLDER, "nothing that is asked for is lost"):
        if not held.alone():
            raise UserError(str(data_dir / FOLDER), "a process is making controls there; prune when it is done")
        for path, made in list(records.all(kind.name)):
            if made.control in asked:
                continue
            for file in _of(records, made):
                freed_bytes += file.stat().st_size
                file.unlink()
            path.unlink()
            count += 1
    return f"{kind.name}: {count} controls deleted, {freed_bytes / 1e9:.3g} GB freed"


def _of(records: Records, made: Made) -> Iterator[Path]:
    """The control, and what `verify` has set aside of it."""
    path = records.data_dir / made.control
    if (records.data_dir / FOLDER).resolve() not in path.resolve().parents:
        return  # a record that somebody else wrote
    if path.is_file() and records.may_go(made.control, made):
        yield path
    if (aside := path.with_name(f"{path.name}.damaged")).is_file():
        yield aside

"""Controls that were made of another clip than the one they are listed with: one that was replaced, or exchanged.

(no torch)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

from reeltune.control.records import data_dir_of, key_of, made_by, place_of
from reeltune.core.types import Record
from reeltune.data.records import Records
from reeltune.data.scan import notice_of

SENTENCE = (
    "the control was made of another clip than the one it is listed with, or by another version: run reeltune control "
    "again, or see that they fit"
)


def stale_controls(*lists: Records) -> list[str]:
    """A notice of them, if there are any. Controls that `reeltune control` has not made are not looked at."""
    stale, find = [], cache(data_dir_of)  # which is one for the thousands of controls in a folder
    made_here = cache(lambda folder: find(os.path.abspath(folder)) is not None)
    for records in lists:
        controls = zip(records.column("control_path"), records.column("camera_path"), strict=True)
        rows = [row for row, (a, b) in enumerate(controls) if (a or b) and made_here(os.path.dirname(a or b))]
        stale += [record.entry for record in records.take(rows) if _is_stale(record, find)]
    return [notice_of(len(stale), stale, SENTENCE)] if stale else []


def _is_stale(record: Record, find: Callable[[str], str | None]) -> bool:
    control = record.control_path or record.camera_path
    place = None if control is None or not record.path else place_of(control, find)
    if control is None or place is None:
        return False
    records, kind, name = place
    try:
        # A clip that nobody has touched since needs no more than two looks at the folder.
        untouched = os.stat(record.path).st_ctime_ns < records.path(kind, name).stat().st_mtime_ns
    except OSError:  # no record of it, or a clip that has gone
        return False
    own = os.path.join(records.data_dir, name.split("/", 2)[2])  # or with another ending, or one more
    if untouched and own.startswith(os.path.abspath(record.path)):
        return False
    made = made_by(control)
    return made is not None and made.key != key_of(made.kind, made.detector, record.content, made.control)

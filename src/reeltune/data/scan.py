"""A metadata file to Records: every row checked, every file measured once, every bad row listed.  (no torch)"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from reeltune.core.errors import UserError
from reeltune.core.files import whole_file
from reeltune.core.types import Record
from reeltune.data.keypoints import is_keypoints
from reeltune.data.lists import read_list, rows
from reeltune.data.measuring import File, Finding, measure_files, stamps
from reeltune.data.media import DecodeCheck, Measure
from reeltune.data.metadata import Folder, LeftOut, Problem, Row, check_row, shown
from reeltune.data.near_miss import NearMisses
from reeltune.data.records import OF_PATHS, Records

SCAN_VERSION = 5  # raise it when a row is judged otherwise
SAME_ASPECT = 1.02  # a control may differ by this factor in width / height: sizes rounded to a multiple do
ODD_RATES = (1, 1000)  # frames a second, beyond which a clip's times are rather wrong than meant
SAME_RATE = 0.02  # rates may differ by this share: headers round them
LONG_SIDE = 4.0  # the most elongated bucket is 4:1; beyond it most of a picture is cut away
WORDS = {"video": "a clip", "image": "a picture", "camera": "a camera path", "keypoints": "a file of key points"}
NAMED_ENTRIES = 10  # that a notice names


@dataclass(frozen=True)
class Scan:
    records: Records
    left_out: list[LeftOut]
    notices: list[str]
    entries: int  # of the metadata file: all are in records or left out

    def __post_init__(self):
        assert self.entries == len(self.records) + len(self.left_out)


def scan(
    meta: Path,
    data_dir: Path,
    *,
    needs: frozenset[str],
    decode_check: DecodeCheck = "ends",
    allow_outside_paths: bool = False,
    max_bad_share: float = 0.05,
    index_dir: Path | None = None,
    workers: int = 1,
    seconds_per_file: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
    just_scanned: bool = False,
) -> Scan:
    """Check and measure everything that `meta` lists.

    needs             what the mode cannot do without, of "control" and "camera"; controls of no use are not opened
    index_dir         where to remember findings; a second start then reads changed files alone
    workers           processes that measure
    seconds_per_file  of processor time; a file that takes more is left out
    progress          called with (files done, files)
    just_scanned      another process of this run has put it into index_dir: files are not looked at again
    Raises UserError naming the metadata file: if it cannot be read, if nothing in it can be used, or with every bad
    row if their share exceeds max_bad_share. And if data_dir is a file.
    """
    data = read_list(meta)
    _refuse_file(data_dir, meta)
    folder = Folder(data_dir, allow_outside_paths)
    options = [SCAN_VERSION, str(meta.absolute()), folder.path, sorted(needs), decode_check, allow_outside_paths]
    saved = index_dir / f"scan-{_digest(json.dumps(options).encode())}.npz" if index_dir else None
    try:
        found = _load(saved, _digest(data), just_scanned) if saved else None
        if found is None:
            files = _files(meta, data, folder, needs)
            stamps_N2 = stamps(file.path for file in files)
            findings = measure_files(
                files,
                stamps_N2,
                decode_check=decode_check,
                index_dir=index_dir,
                workers=workers,
                seconds_per_file=seconds_per_file,
                progress=progress,
            )
            judge = _Judge(dict(zip(files, findings, strict=True)), NearMisses(folder.path))
            records = Records.of(judge.records(meta, data, folder, needs))
            found = Scan(records, judge.left_out, judge.notices(), len(records) + len(judge.left_out))
            if saved:
                lasting = all(finding.lasting for finding in findings)
                _save(saved, _digest(data), found, [file.path for file in files], stamps_N2, lasting)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(str(meta), f"cannot be checked: {error.strerror}; raise that limit (ulimit -n)") from error
        told = f"the index cannot be written: {error.strerror}; give an output_dir where it can be"
        raise UserError(str(index_dir), told) from error
    _refuse_bad(meta, data_dir, found, max_bad_share)
    return found


def _refuse_file(data_dir: Path, meta: Path) -> None:
    if data_dir.is_file():
        what = "is that list" if data_dir.resolve() == meta.resolve() else "is a file"
        remedy = f"give the folder in which the list's paths begin, as {data_dir.absolute().parent} may be"
        raise UserError("train_data_dir", f"{str(data_dir)!r} {what}; {remedy}")


def _refuse_bad(meta: Path, data_dir: Path, found: Scan, max_bad_share: float) -> None:
    bad, total = len(found.left_out), found.entries
    if total == 0:
        raise UserError(str(meta), "the list is empty: there is nothing to train on")
    if bad == total or bad > max_bad_share * total:
        rule = "nothing is left to train on"
        if bad < total:
            rule = f"max_bad_share allows {max_bad_share:.2%}; mend them, or raise max_bad_share to train without them"
        elif not data_dir.is_dir():
            rule += f"; train_data_dir {str(data_dir)!r}, where their paths begin, is no folder; mend it"
        head = f"{bad} of {total} entries ({bad / total:.2%}) cannot be used; {rule}"
        raise UserError(str(meta), [head, *map(str, found.left_out)])


def _files(meta: Path, data: bytes, folder: Folder, needs: frozenset[str]) -> list[File]:
    """Every file that a sound row names, once."""
    files: dict[File, None] = {}
    for fields in rows(meta, data):
        row = check_row(fields, folder, needs)
        if not row.problems:
            files.update(dict.fromkeys(_files_of(row)))
    return list(files)


def _files_of(row: Row) -> list[File]:
    files = [File(row.path, row.kind)]
    if control := _control_of(row):
        files.append(control)
    if row.camera:
        files.append(File(row.camera, "camera"))
    return files + [File(path, "image") for path in row.subjects]


def _control_of(row: Row) -> File | None:
    if row.control and is_keypoints(row.control):
        return File(row.control, "keypoints", row.path if row.kind == "video" else "")
    return File(row.control, row.kind) if row.control else None


class _Judge:
    """Rows and findings to records, left-out rows and notices."""

    def __init__(self, findings: dict[File, Finding], near_misses: NearMisses):
        self.findings = findings
        self._near_misses = near_misses
        self.left_out: list[LeftOut] = []
        self._noticed: dict[str, list[int]] = {}  # sentence -> [how many, entries to name...]
        self._seen_files: set[int] = set()  # hashes, which are smaller than the strings
        self._seen_uses: set[int] = set()

    def records(self, meta: Path, data: bytes, folder: Folder, needs: frozenset[str]):
        """Yields a Record for each good row; the others gather in left_out."""
        for entry, fields in enumerate(rows(meta, data)):
            row = check_row(fields, folder, needs)
            measured = None if row.problems else self._measured(row)
            if measured is None or row.problems:
                reasons = "; ".join(problem.reason for problem in row.problems)
                remedies = "; ".join(dict.fromkeys(problem.remedy for problem in row.problems))
                self.left_out.append(LeftOut(entry, row.named, reasons, remedies))
                continue
            self._notice_repeats(row)
            for sentence in row.notices:
                count_entries = self._noticed.setdefault(sentence, [0])
                count_entries[0] += 1
                if len(count_entries) <= NAMED_ENTRIES:
                    count_entries.append(entry)
            yield Record(
                entry=entry,
                path=row.path,
                text=row.text,
                kind=measured.kind,
                frames=measured.frames,
                fps=measured.fps,
                height=measured.height,
                width=measured.width,
                control_path=row.control,
                camera_path=row.camera,
                content=measured.content,
                control_content=self._content_of_control(row),
            )

    def notices(self) -> list[str]:
        return [notice_of(count, named, sentence) for sentence, (count, *named) in self._noticed.items()]

    def _measured(self, row: Row) -> Measure | None:
        """The row's file. What is wrong with it or with a file beside it is added to the row's problems."""
        own, *_ = found = [self.findings[file] for file in _files_of(row)]
        for file, finding in zip(_files_of(row), found, strict=True):
            if finding.reason is not None:
                name = "the file" if file.path == row.path else shown(file.path)
                what = WORDS[file.kind]
                remedy = finding.remedy or f"Put {what} that is whole there, or remove the entry"
                near = None if os.path.exists(file.path) else self._near_misses.of(file.path)
                reason = f"{name} {finding.reason}" + (f"; {near}" if near else "")
                row.problems.append(Problem(reason, "Correct the path" if near else remedy))
        if row.problems or own.measure is None:
            return None
        row.notices.extend(own.measure.notes)
        if file := _control_of(row):
            control = self.findings[file].measure
            assert control is not None  # or it would have a reason
            _compare_control(row, own.measure, control)
            row.notices += [f"of the control: {note}" for note in control.notes if note not in own.measure.notes]
        if row.camera and self.findings[File(row.camera, "camera")].poses != own.measure.frames:
            row.notices.append("the camera path has not one pose for each frame, and is stretched over the clip")
        self._compare_stated(row, own.measure)
        return own.measure

    def _content_of_control(self, row: Row) -> int:
        """The content of a control or a camera path, as it was measured; 0 where there is none."""
        file = File(row.camera, "camera") if row.camera else _control_of(row)
        return self.findings[file].content if file else 0

    def _compare_stated(self, row: Row, own: Measure) -> None:
        """What the file is with what the row says, and with what files usually are."""
        size = own.height, own.width
        stated = tuple(given if given is not None else held for given, held in zip(row.stated, size, strict=True))
        if stated == size[::-1] and own.height != own.width:
            row.notices.append("width and height are exchanged; the file's own size is used")
        elif stated != size:
            row.notices.append("width and height are not the file's; the file's own size is used")
        if own.fps and not ODD_RATES[0] <= own.fps <= ODD_RATES[1]:
            least, most = ODD_RATES
            sentence = f"by its own times it has less than {least} frame or more than {most:,} a second"
            row.notices.append(f"{sentence}, by which video_sample_fps takes them; see whether they are right")
        if max(own.height / own.width, own.width / own.height) > LONG_SIDE:
            row.notices.append(f"the picture is longer than {LONG_SIDE:g}:1, and most of it will be cut away")

    def _notice_repeats(self, row: Row) -> None:
        file, use = hash(row.path), hash((row.path, row.text, row.control, row.camera))
        if use in self._seen_uses:
            row.notices.append("the entry repeats an earlier one, and is kept")
        elif file in self._seen_files:
            row.notices.append("an earlier entry has the same file with another caption or control; both are kept")
        self._seen_files.add(file)
        self._seen_uses.add(use)


def notice_of(count: int, entries: Iterable[int], sentence: str) -> str:
    """What holds of so many entries, of which the first are named."""
    named = ", ".join(map(str, islice(entries, NAMED_ENTRIES))) + (", ..." if count > NAMED_ENTRIES else "")
    return f"{count} {'entry' if count == 1 else 'entries'} ({named}): {sentence}"


def _compare_control(row: Row, own: Measure, control: Measure) -> None:
    assert row.control is not None
    name = shown(row.control)
    if control.frames != own.frames:
        reason = f"control {name} has {control.frames} frames, its clip {own.frames}: lengths differ"
        row.problems.append(Problem(reason, "Make the control from the clip, frame by frame"))
    factor = (control.width / control.height) / (own.width / own.height)
    if abs(math.log(factor)) > math.log(SAME_ASPECT):
        sizes = f"{control.width}x{control.height} pixels, its subject {own.width}x{own.height}"
        row.problems.append(Problem(f"control {name} has {sizes}: aspects differ", "Make the control in that aspect"))
    if own.content and own.content == control.content:
        row.notices.append("its control is the clip itself or a copy of it, and teaches the model to copy its control")
    if own.fps and abs(control.fps / own.fps - 1) > SAME_RATE:
        row.notices.append("its control has another rate; frame by frame they are read together, whatever their times")


# A finished scan on disk


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _save(path: Path, digest: str, found: Scan, paths: list[str], stamps_N2: np.ndarray, lasting: bool) -> None:
    told = {
        "digest": digest,
        "lasting": lasting,
        "left_out": [asdict(left) for left in found.left_out],
        "notices": found.notices,
        "entries": found.entries,
    }
    arrays = {
        **found.records.arrays(),
        "told": np.frombuffer(json.dumps(told).encode(), np.uint8),
        "paths": np.frombuffer("\0".join(paths).encode(**OF_PATHS), np.uint8),
        "stamps": stamps_N2,
    }
    with whole_file(path, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _load(path: Path, digest: str, just_scanned: bool) -> Scan | None:
    """The scan, unless the list or any file has changed since, or what was found need not last."""
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = dict(held)
        told = json.loads(arrays.pop("told").tobytes())
        paths = arrays.pop("paths").tobytes().decode(**OF_PATHS)
        stamps_N2, lasting = arrays.pop("stamps"), told["lasting"]
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError, EOFError):  # absent, or not whole: scan anew
        return None
    if told["digest"] != digest:
        return None
    if not just_scanned and not (lasting and np.array_equal(stamps(paths.split("\0") if paths else []), stamps_N2)):
        return None
    left_out = [LeftOut(**left) for left in told["left_out"]]
    return Scan(Records(**arrays), left_out, told["notices"], told["entries"])

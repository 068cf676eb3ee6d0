"""What became of every entry of the metadata file: used, held out, not reached or left out; the counts add up.

ledger.json   the summary and every entry left out, with reason and remedy
ledger.csv    one row per entry
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reeltune.core.errors import UserError
from reeltune.core.files import whole_file
from reeltune.core.reading import as_user_error
from reeltune.core.shown import cell
from reeltune.core.types import Draw
from reeltune.data.identity import Identity, changes
from reeltune.data.metadata import LeftOut
from reeltune.data.records import Records

STATUSES = ("used", "not reached", "held out", "left out")
USED, NOT_REACHED, HELD_OUT, LEFT_OUT = range(len(STATUSES))


class Share(NamedTuple):
    """What one process has trained on."""

    used: np.ndarray  # int32 per record: times trained on in its turn
    repeated: np.ndarray  # int32 per record: times trained on in the place of another, or to fill a group
    failures: dict[int, tuple[int, str]]  # record -> (times, last reason) it could not be read


class Ledger:
    """Counts what this process trains on; at the end the shares of all processes make the account.

    `train` are the records that a Draw counts by, `held_out` those of the same metadata file kept for validation,
    `left_out` the entries that the scan or the plan left out, `unsuited` sound ones that teach the model nothing:
    left out too, but not bad. root: the data's folder. Per good row two int32 are kept, and once it is saved what the
    record was, in four numbers.
    """

    def __init__(
        self,
        entries: int,
        train: Records,
        *,
        held_out: Records | None = None,
        left_out: Iterable[LeftOut] = (),
        unsuited: Iterable[LeftOut] = (),
        max_bad_share: float = 1.0,
        root: Path = Path(),
    ):
        self.entries = entries
        self.root = root
        self.train = train
        self.held_out = held_out
        bad, unsuited = list(left_out), list(unsuited)
        self.left_out = {row.entry: row for row in bad + unsuited}
        self._bad = len(bad)
        self.max_bad_share = max_bad_share
        self.used = np.zeros(len(train), dtype=np.int32)
        self.repeated = np.zeros(len(train), dtype=np.int32)
        self.failures: dict[int, tuple[int, str]] = {}

    def count(self, draws: Iterable[Draw], failures: Iterable[tuple[int, str]] = ()) -> None:
        """Draws that were trained on, and (record, reason) of those that others stood in for."""
        for draw in draws:
            (self.repeated if draw.repeat else self.used)[draw.record] += 1
        for record, reason in failures:
            times, _ = self.failures.get(record, (0, ""))
            self.failures[record] = (times + 1, reason)

    def too_many_bad(self) -> str | None:
        """The problem, once this process has seen more than max_bad_share of all entries to be unusable."""
        bad = self._bad + len(self.failures)
        if bad <= self.max_bad_share * self.entries:
            return None
        record, (_, reason) = next(reversed(self.failures.items()))
        return (
            f"{bad} of {self.entries} entries cannot be used, more than max_bad_share = {self.max_bad_share:g} allows; "
            f"{len(self.failures)} of them broke during the run, lastly {self.train[record].path}: {reason}; "
            "mend them (ledger.csv lists all), or raise max_bad_share"
        )

    @cached_property
    def identity(self) -> Identity:
        """What tells the records trained on from others, as they are when this is first asked for: at a resume, or the
        first save."""
        return Identity.of(self.train, self.root)

    def share(self) -> Share:
        """This process's counts as they are now."""
        return Share(self.used.copy(), self.repeated.copy(), dict(self.failures))

    def save(self, path: Path, shares: Sequence[Share] | None = None) -> None:
        """Writes the counts of all processes, and what the records were, as .npz, for a later `load`."""
        whole = _sum(shares or [self.share()])
        records = sorted(whole.failures)
        arrays = dict(
            used=whole.used,
            repeated=whole.repeated,
            failed=np.array(records, dtype=np.int64),
            failed_times=np.array([whole.failures[record][0] for record in records], dtype=np.int64),
            failed_reason=np.array([whole.failures[record][1] for record in records], dtype=np.str_),
        )
        np.savez_compressed(path, allow_pickle=False, **arrays, **self.identity.arrays())

    def load(self, path: Path, *, accept_changes: bool = False) -> list[str]:
        """Goes on from saved counts. On one process only, or they count once for each.

        Returns notices of what has changed of the data since. Raises UserError that names it, unless it is new records
        and captions alone and `accept_changes`; and for a file that cannot be read.
        """
        with as_user_error(path, "is damaged", "resume from an earlier checkpoint"):
            with np.load(path, allow_pickle=False) as held:
                saved = dict(held)
            used, repeated, failed = saved["used"], saved["repeated"], saved["failed"].tolist()
            reasons = zip(failed, saved["failed_times"].tolist(), saved["failed_reason"].tolist(), strict=True)
            failures = {record: (times, reason) for record, times, reason in reasons}
            then = Identity.stored(saved)
        moved_to, notices = self._moved(path, then, len(used), accept_changes)
        self.used[moved_to], self.repeated[moved_to] = used, repeated
        self.failures = {int(moved_to[record]): failure for record, failure in failures.items()}
        return notices

    def _moved(
        self, path: Path, then: Identity | None, count: int, accept_changes: bool
    ) -> tuple[np.ndarray, list[str]]:
        """(the row now of each record of the checkpoint, what has changed in words). Raises as `load`."""
        anew = f"start anew from its weights: transformer_path {path.parent}, and another output_dir"
        if then is None:
            if count != len(self.train):
                raise UserError(
                    "resume",
                    f"the checkpoint has seen a data set of {count} usable records and this one has "
                    f"{len(self.train)}; resume with the same metadata, or {anew}",
                )
            return np.arange(count), []
        change = changes(then, self.identity)
        lines = list(change.lines(self.train))
        if change.breaking:
            where = f"resume from {path.parent}: the data has changed, and clips would be trained twice or never"
            raise UserError(f"{where}; restore it, or {anew}", lines)
        if lines and not accept_changes:
            where = f"resume from {path.parent}: the data has changed"
            raise UserError(f"{where}; set accept_changed_data to go on with it, restore it, or {anew}", lines)
        more = " (what is left of this epoch is drawn anew from all of them)" if change.added else ""
        return change.moved_to, [f"the data has changed since {path.parent.name}: {line}{more}" for line in lines]

    def write(self, output_dir: Path, shares: Sequence[Share] | None = None) -> dict:
        """Writes ledger.json and ledger.csv. Returns the summary, whose four statuses add up to `entries`."""
        whole = _sum(shares or [self.share()])
        trained = whole.used + whole.repeated
        problems = dict(self.left_out)
        for record, (times, reason) in whole.failures.items():
            told = f"could not be read {times} time{'s' if times != 1 else ''} during the run: {reason}"
            entry = int(self.train.entry[record])
            problems[entry] = LeftOut(entry, self.train[record].path, told, "mend the file or remove its entry")
        status = np.full(self.entries, LEFT_OUT, dtype=np.int8)
        status[self.train.entry] = np.where(trained > 0, USED, NOT_REACHED)
        if self.held_out is not None:
            status[self.held_out.entry] = HELD_OUT
        never = [entry for entry in problems if status[entry] == NOT_REACHED]
        status[never] = LEFT_OUT

        per_status = np.bincount(status, minlength=len(STATUSES))
        assert per_status.sum() == self.entries
        assert problems.keys() >= set(np.flatnonzero(status == LEFT_OUT).tolist()), "an entry was lost without a reason"
        assert not any(status[entry] == USED for entry in self.left_out), "an entry that was left out was trained on"
        summary = {
            "entries": self.entries,
            **{name.replace(" ", "_"): int(n) for name, n in zip(STATUSES, per_status, strict=True)},
            "samples": int(trained.sum(dtype=np.int64)),
            "samples_repeated": int(whole.repeated.sum(dtype=np.int64)),
            "most_used": int(trained.max(initial=0)),
            "failed_reads": sum(times for times, _ in whole.failures.values()),
        }
        rows = [asdict(problems[entry]) for entry in sorted(problems)]
        with whole_file(Path(output_dir) / "ledger.json") as file:
            file.write(json.dumps({**summary, "problems": rows}, indent=2) + "\n")
        self._write_csv(Path(output_dir) / "ledger.csv", status, whole, problems)
        return summary

    def _write_csv(self, path: Path, status: np.ndarray, whole: Share, problems: dict[int, LeftOut]) -> None:
        """A million rows pass through, none stays."""
        index = np.full(self.entries, -1, dtype=np.int64)  # of the entry in `train` or in `held_out`
        index[self.train.entry] = np.arange(len(self.train))
        if self.held_out is not None:
            index[self.held_out.entry] = np.arange(len(self.held_out))
        with whole_file(path) as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(["entry", "path", "status", "used", "repeated", "reason"])
            for entry, (code, i) in enumerate(zip(status, index, strict=True)):
                bad = problems.get(entry)
                if code == HELD_OUT:
                    assert self.held_out is not None
                    row = (self.held_out[int(i)].path, 0, 0, "")
                elif i < 0:
                    assert bad is not None
                    row = (bad.path, 0, 0, bad.reason)
                else:
                    row = (self.train[int(i)].path, whole.used[i], whole.repeated[i], bad.reason if bad else "")
                name, used, repeated, reason = row
                out.writerow([entry, cell(name or ""), STATUSES[code], used, repeated, cell(reason)])


def _sum(shares: Sequence[Share]) -> Share:
    failures: dict[int, tuple[int, str]] = {}
    for share in shares:
        for record, (times, reason) in share.failures.items():
            failures[record] = (failures.get(record, (0, ""))[0] + times, reason)
    return Share(
        np.stack([share.used for share in shares]).sum(axis=0, dtype=np.int32),
        np.stack([share.repeated for share in shares]).sum(axis=0, dtype=np.int32),
        failures,
    )


def in_words(summary: Mapping[str, int], held_out_from: str | None) -> str:
    """The counts of `Ledger.write` in a line. held_out_from: the list that all held-out clips are of, if it is another:
    then none of these entries is held out."""
    left_out = f"{summary['left_out']} left out" if summary["left_out"] else "none left out"
    held_out = "" if held_out_from is not None else f"{summary['held_out']} held out, "
    whose = "" if held_out_from is None else f"; held-out clips are those of validation_data_meta, {held_out_from}"
    return (
        f"{summary['entries']} entries: {summary['used']} used, {held_out}{summary['not_reached']} not reached, "
        f"{left_out} (ledger.csv){whose}"
    )

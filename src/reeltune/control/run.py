"""`reeltune control` from its settings to its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from reeltune.control.kinds import kind_named
from reeltune.control.outcome import ledger_of, outcomes, page_of, require_new, write_ledger, write_list
from reeltune.control.sheet import write_sheet
from reeltune.control.stage import Maker, Order, make_all
from reeltune.core.errors import together


def run(order: Order, outs: Mapping[str, Path], workers: int, least_score: float | None) -> Iterator[str]:
    """Makes what is missing and writes a list, a ledger and a contact sheet for each kind. Tells where they are.

    Raises UserError, and SystemExit with 128 + the signal that ended it, which leaves lists as they were.
    """
    with together("control") as attempt:
        for out in outs.values():
            attempt(require_new, out, order.meta, order.kinds)
        detectors = attempt(order.opened)
    entries = order.entries
    maker = Maker(order, detectors)
    code = make_all(order, maker, workers)
    if code:
        raise SystemExit(code)
    with together("control") as attempt:
        for name, out in outs.items():
            kind = kind_named(name)
            found = outcomes(entries, kind, maker, least_score)
            ledger, page = ledger_of(out), page_of(out)
            write_ledger(ledger, kind, found)
            write_sheet(page, kind, order.data_dir, found)
            if count := attempt(write_list, out, found):
                yield f"{out}: {count} of {len(found)} entries have a control ({ledger.name}; {page.name} shows them)"

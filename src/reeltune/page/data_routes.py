"""The addresses of data lists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from reeltune.core.errors import UserError
from reeltune.data.findings import MediaError
from reeltune.data.keypoints import is_keypoints
from reeltune.data.metadata import IMAGE_ENDINGS
from reeltune.page import captions, controls
from reeltune.page.listing import MEASURED_FILTERS, OWN_FILTERS, PER_PAGE
from reeltune.page.lists import ALONE, Asked, Lists, is_named
from reeltune.page.pictures import drawn_clip, poster
from reeltune.page.site import Form, Site, after_post, posted, whole_number

if TYPE_CHECKING:
    from reeltune.page.judged import Judged

MOST_LEFT_OUT = 200  # rows of a ledger that are shown


class Pages:
    def __init__(self, site: Site):
        self.site, self.lists = site, Lists(site)

    def screen(self, request: Request) -> Response:
        asked = self.lists.asked(request)
        judged, wrong = self.lists.judged(asked)
        show, words = request.query_params.get("show", "all"), request.query_params.get("words", "")[:200].strip()
        entries = self.lists.kept(asked, judged, show, words)
        page = whole_number(request.query_params.get("page"), default=0)
        on_page = entries[page * PER_PAGE : (page + 1) * PER_PAGE].tolist()
        return self.site.page(
            "data.html",
            here="data",
            asked=asked,
            name=self.site.shelf.name_of(asked.path),
            recipes={id: self.site.shelf.name_of(recipe.path) for id, recipe in asked.recipes.items()},
            judged=judged,
            wrong=wrong,
            measuring=self.lists.jobs.begun(asked.key) and judged is None and wrong is None,
            filters={**OWN_FILTERS, **({name: MEASURED_FILTERS[name] for name in judged.kept} if judged else {})},
            counts={name: len(entries) for name, entries in judged.kept.items()} if judged else {},
            show=show,
            words=words,
            cards=[_card(self.lists, asked, judged, entry) for entry in on_page],
            count=len(entries),
            page=page,
            pages=max(-(-len(entries) // PER_PAGE), 1),
            per_page=PER_PAGE,
            undoable=captions.changes(_undo(self.site, asked)),
            copy=captions.edited_path(asked.path).name,
            is_copy=captions.edited_path(asked.path) == asked.path,
            histogram=judged.histogram if judged is not None else None,
            without_control=controls.left_out(asked.path, self.site.shelf.holds, MOST_LEFT_OUT),
        )

    def state(self, request: Request) -> Response:
        """Whether measuring has ended; then the page is asked for anew."""
        asked = self.lists.asked(request)
        judged, wrong = self.lists.jobs.result(asked.key)
        ended = judged is not None or wrong is not None
        answer = self.site.page("measuring.html", asked=asked, ended=ended)
        if ended:
            answer.headers["HX-Refresh"] = "true"
        return answer

    def measure(self, request: Request, _: Form) -> Response:
        asked = self.lists.asked(request)
        self.lists.jobs.forget(asked.key)
        self.lists.judge(asked)
        return after_post(request, asked.address())

    def picture(self, request: Request) -> Response:
        path = _file(self.lists, request)
        real = self.site.shelf.file(path)
        if real is None:
            raise HTTPException(404, "There is no such file below the served folder.")
        try:
            return self.site.made(poster(real, self.site.store))
        except MediaError as error:
            raise HTTPException(404, f"{path.name} {error}") from None

    def media(self, request: Request) -> Response:
        path = _file(self.lists, request)
        real = self.site.shelf.file(path)
        if real is None or not is_keypoints(real):
            return self.site.file(path)
        try:
            return self.site.made(drawn_clip(real, self.site.store))
        except MediaError as error:
            raise HTTPException(404, f"{path.name} {error}") from None

    def caption(self, request: Request, form: Form) -> Response:
        self.site.must("edit")
        asked = self.lists.asked(request)
        entry = _entry(asked, request)
        text = form.get("text", "").replace("\r\n", "\n").strip()
        was = asked.listing.text(entry)
        if form.get("was", "").replace("\r\n", "\n") != was.replace("\r\n", "\n"):
            raise UserError("caption", "it has been changed meanwhile; reload the page, and look at it again")
        if text != was:
            fields = asked.listing.entries[entry]
            named = fields.get("file_path") if isinstance(fields, dict) else None
            copy = captions.edit(asked.path, captions.Change(entry, was, text, named), _undo(self.site, asked))
            self.site.look()
            id = self.site.shelf.id_of(copy)
        else:
            id = asked.id
        return after_post(request, _back(self.site, id, asked, form) + f"#e{entry}")

    def undo(self, request: Request, form: Form) -> Response:
        self.site.must("edit")
        asked = self.lists.asked(request)
        entry = captions.undo_last(asked.path, _undo(self.site, asked))
        return after_post(request, _back(self.site, asked.id, asked, form) + f"#e{entry}")

    def as_seen(self, request: Request) -> Response:
        from reeltune.page import seen

        asked = self.lists.asked(request)
        judged, wrong = self.lists.judged(asked)
        if wrong is not None:
            raise wrong
        epoch = whole_number(request.query_params.get("epoch"), default=0)
        step = whole_number(request.query_params.get("step"), default=0)
        found = None
        if judged is not None and judged.inputs is not None:
            try:
                found = seen.micro_step(judged, epoch, step, self.site.store, self.site.shelf.holds)
            except LookupError:
                last = len(judged.inputs.plan(epoch)) - 1
                raise HTTPException(404, f"An epoch has the micro-steps 0 to {last}; {step} is none.") from None
        name = self.site.shelf.name_of(asked.path)
        return self.site.page(
            "seen.html", here="data", asked=asked, name=name, judged=judged, epoch=epoch, step=step, found=found
        )

    def seen_file(self, request: Request) -> Response:
        key, name = request.path_params["key"], request.path_params["name"]
        folder = self.site.store / "seen"
        if key not in {path.name for path in folder.glob("*")} or name not in {
            p.name for p in (folder / key).glob("*")
        }:
            raise HTTPException(404, "There is no such file.")
        return self.site.made(folder / key / name)


def routes(site: Site) -> list[Route]:
    pages = Pages(site)
    return [
        Route("/lists/{id}", pages.screen),
        Route("/lists/{id}/state", pages.state),
        Route("/lists/{id}/seen", pages.as_seen),
        Route("/seen/{key}/{name}", pages.seen_file),
        Route("/lists/{id}/measure", posted(pages.measure), methods=["POST"]),
        Route("/lists/{id}/undo", posted(pages.undo), methods=["POST"]),
        Route("/lists/{id}/{entry}/caption", posted(pages.caption), methods=["POST"]),
        Route("/lists/{id}/{entry}/{column}/poster", pages.picture),
        Route("/lists/{id}/{entry}/{column}", pages.media),
    ]


def _back(site: Site, id: str, asked: Asked, form: Form) -> str:
    """The address of the list's page where the caption was changed."""
    names = {
        recipe for recipe, one in site.shelf.found.recipes.items() if is_named(one.named("train_data_meta"), asked.path)
    }
    by = asked.by if id == asked.id and asked.by in names else ALONE
    query = {"by": by, "show": form.get("show", ""), "words": form.get("words", ""), "page": form.get("page", "")}
    return f"/lists/{id}?" + urlencode({name: value for name, value in query.items() if value})


def _undo(site: Site, asked: Asked) -> Path:
    return site.store / "undo" / f"{site.shelf.id_of(captions.edited_path(asked.path))}.json"


def _entry(asked: Asked, request: Request) -> int:
    entry = whole_number(request.path_params["entry"])
    if entry >= len(asked.listing.entries):
        raise HTTPException(404, "The list has no such entry.")
    return entry


def _file(lists: Lists, request: Request) -> Path:
    """What the entry names in that column. 404 for nothing."""
    asked, column = lists.asked(request), request.path_params["column"]
    row = asked.listing.row(_entry(asked, request))
    path = {"clip": row.path, "control": row.control}.get(column)
    if not path:
        raise HTTPException(404, "The entry names no such file.")
    return Path(path)


def _card(lists: Lists, asked: Asked, judged: Judged | None, entry: int) -> dict[str, Any]:
    """What the contact sheet shows of an entry."""
    row = asked.listing.row(entry)
    files = {"clip": row.path, "control": row.control}
    there = {column: path for column, path in files.items() if path and lists.site.shelf.file(path) is not None}
    record = judged.records.get(entry) if judged else None
    facts = [] if record is None else [f"{record.width} x {record.height}"]
    if record is not None and record.fps > 0:
        facts.append(f"{record.frames} frames, {record.fps:.3g} per second, {record.frames / record.fps:.1f} s")
    if (made := there.get("control")) and (told := controls.about_control(made, lists.site.shelf.holds)):
        facts.append(told)
    fields = asked.listing.entries[entry]
    control = fields.get("control_file_path") if isinstance(fields, dict) else None
    marks = [MEASURED_FILTERS[name] for name, kept in (judged.kept if judged else {}).items() if _holds(kept, entry)]
    reason = (judged.reasons.get(entry) if judged else None) or "; ".join(problem.reason for problem in row.problems)
    return {
        "entry": entry,
        "name": row.named or "(no file)",
        "text": asked.listing.text(entry),
        "there": there,
        "still": {column: Path(path).suffix.lower() in {*IMAGE_ENDINGS, ".gif"} for column, path in there.items()},
        "facts": facts,
        "camera": control if row.camera and isinstance(control, str) else None,
        "marks": marks,
        "reason": reason,
        "missing": [column for column, path in files.items() if path and column not in there],
    }


def _holds(entries: np.ndarray, entry: int) -> bool:
    place = int(np.searchsorted(entries, entry))
    return place < len(entries) and int(entries[place]) == entry

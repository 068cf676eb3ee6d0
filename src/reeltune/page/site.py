"""What every route needs: the shelf, what is allowed, where pictures are kept, templates and refusals."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from reeltune.core.errors import UserError
from reeltune.core.files import REFUSED, refusal, writing
from reeltune.core.user_folder import user_cache_folder
from reeltune.page.found import Found, Shelf
from reeltune.page.runs import Run
from reeltune.reporting import report

TYPES = {  # that a browser shows; a file of any other ending is handed out as bytes
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".m4v": "video/mp4",
    ".mkv": "video/x-matroska",
    ".mov": "video/quicktime",
    ".mp4": "video/mp4",
    ".ogv": "video/ogg",
    ".png": "image/png",
    ".webm": "video/webm",
    ".webp": "image/webp",
}
Form = dict[str, str]
MOST_FIELDS = 1000  # of a form


@dataclass
class Site:
    shelf: Shelf
    edit: bool
    run: bool
    store: Path  # for pictures and indices, which can be made again, and for the logs of what is started
    runs: dict[str, Run] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, folder: Path, *, edit: bool, run: bool) -> Site:
        shelf = Shelf(folder)
        shelf.look()
        base = user_cache_folder() or Path(tempfile.mkdtemp(prefix="reeltune-"))
        store = base / "page" / hashlib.blake2b(os.fsencode(shelf.real), digest_size=8).hexdigest()
        with writing(store):
            store.mkdir(parents=True, exist_ok=True, mode=0o700)  # pictures of what others may not read
        return cls(shelf, edit, run, store)

    def look(self) -> Found:
        return self.shelf.look()

    def known(self, kind: str, id: str) -> Any:
        """The run, list, cache or recipe of that id; 404 for none."""
        for found in (self.shelf.found, None):
            table = getattr(found or self.look(), kind)
            if id in table:
                return table[id]
        raise HTTPException(404, f"There is no such thing among the {kind}.")

    def run_of(self, id: str) -> Run:
        """404 for a run whose folder is gone, or leads elsewhere by now."""
        folder = self.known("runs", id)
        if not (folder.is_dir() and self.shelf.holds(folder)):
            self.look()
            raise HTTPException(404, f"{self.shelf.name_of(folder)} is gone; it was deleted, moved or renamed.")
        with self.lock:
            if id not in self.runs:
                self.runs[id] = Run(id, self.shelf.name_of(folder), folder, self.shelf.holds)
            return self.runs[id]

    def must(self, allowed: str) -> None:
        """403 unless the server was started with that flag: "edit" or "run"."""
        if not getattr(self, allowed):
            raise HTTPException(403, f"This page was started without --{allowed}, and changes nothing of that kind.")

    def page(self, template: str, **context: Any) -> Response:
        return HTMLResponse(self.rendered(template, **context))

    def rendered(self, template: str, **context: Any) -> bytes:
        """UTF-8, in which half of a surrogate pair, as names of files and JSON may hold, is written as an escape."""
        template_ = report.environment().get_template(f"page/{template}")
        return template_.render(site=self, **context).encode("utf-8", "backslashreplace")

    def file(self, path: str | Path) -> Response:
        """404 for a file that is not there, or that lies outside of the folder."""
        real = self.shelf.file(path)
        if real is None:
            raise HTTPException(404, "There is no such file below the served folder.")
        kind = TYPES.get(real.suffix.lower(), "application/octet-stream")
        return FileResponse(real, media_type=kind, headers={"Cache-Control": "private, no-cache"})

    def made(self, path: Path) -> Response:
        """A file of the store, whose name changes with what is in it."""
        kind = TYPES.get(path.suffix.lower(), "application/octet-stream")
        return FileResponse(path, media_type=kind, headers={"Cache-Control": "private, max-age=86400, immutable"})


def whole_number(text: str | None, least: int = 0, default: int | None = None) -> int:
    """A whole number from a path or a query; 404 for what is none."""
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 18 or int(text) < least:
        raise HTTPException(404, "There is no such number here.")
    return int(text)


def posted(act: Callable[[Request, Form], Response]) -> Callable[[Request], Awaitable[Response]]:
    """A route that takes a form's fields; of a name that is there twice the last counts."""

    async def route(request: Request) -> Response:
        body = (await request.body()).decode("utf-8", "replace")
        try:
            form = dict(parse_qsl(body, keep_blank_values=True, max_num_fields=MOST_FIELDS))
        except ValueError:
            raise HTTPException(413, f"A form has at most {MOST_FIELDS} fields.") from None
        return await run_in_threadpool(act, request, form)

    return route


def after_post(request: Request, to: str) -> Response:
    """Sends the browser on to a page after a form: by a redirect, or where htmx asked by its header
    (https://htmx.org/reference)."""
    if request.headers.get("hx-request") == "true":
        return Response(status_code=204, headers={"HX-Redirect": to})
    return RedirectResponse(to, 303)


def refusals(site: Site) -> dict[Any, Callable[[Request, Exception], Response]]:
    """What is answered to what was raised."""

    def told(request: Request, title: str, problems: list[str], status: int) -> Response:
        part = request.headers.get("hx-request") == "true"
        template = "problems.html" if part else "refused.html"
        return HTMLResponse(site.rendered(template, title=title, problems=problems, here=""), status)

    def user_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, UserError)
        return told(request, error.where, error.problems, 422)

    def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return told(request, str(error.status_code), [error.detail], error.status_code)

    def refused(request: Request, error: Exception) -> Response:
        """What the system refuses, such as a path too long or gone meanwhile; else the error is ours."""
        assert isinstance(error, OSError)
        if error.errno not in (*REFUSED, errno.ENOENT) or error.filename is None:
            raise error
        return user_error(request, refusal(error))

    return {UserError: user_error, HTTPException: http_error, OSError: refused}

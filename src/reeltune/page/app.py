"""The page: its addresses, put together."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from reeltune.page import data_routes, recipe_routes, run_routes, runs
from reeltune.page.guard import Guard
from reeltune.page.site import Site, refusals
from reeltune.reporting import report

KINDS = {".css": "text/css", ".js": "text/javascript"}


def make_app(folder: Path, token: str, *, edit: bool = False, run: bool = False) -> Guard:
    """An ASGI application that shows what lies below the folder to whoever has the token."""
    site = Site.of(folder, edit=edit, run=run)
    routes = [
        Route("/", _home(site)),
        Route("/favicon.ico", lambda _: Response(status_code=204)),
        Route("/static/style.css", _style),
        *(Route(f"/static/{name}", _static(name)) for name in ("page.js", "htmx.min.js")),
        *run_routes.routes(site),
        *data_routes.routes(site),
        *recipe_routes.routes(site),
    ]
    return Guard(Starlette(routes=routes, exception_handlers=refusals(site)), token)


def _home(site: Site):
    def home(_: Request) -> Response:
        found = site.look()
        return site.page(
            "home.html",
            here="home",
            found=found,
            runs=[runs.summary(site.run_of(id)) for id in sorted(found.runs, key=lambda id: found.runs[id])],
        )

    return home


def _static(name: str):
    data = files("reeltune.page").joinpath("static", name).read_bytes()

    def static(_: Request) -> Response:
        return Response(data, media_type=KINDS[Path(name).suffix])

    return static


def _style(_: Request) -> Response:
    """The report's style, and what the page has beside it."""
    shared = report.environment().get_template("reporting/style.html").render()
    own = files("reeltune.page").joinpath("static", "page.css").read_text(encoding="utf-8")
    return Response(shared.strip().removeprefix("<style>").removesuffix("</style>") + own, media_type=KINDS[".css"])

"""The addresses of runs."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from reeltune.page import actions, live, runs
from reeltune.page.compare import compared
from reeltune.page.runs import Run
from reeltune.page.site import Form, Site, after_post, posted, whole_number
from reeltune.reporting import report


class Pages:
    def __init__(self, site: Site):
        self.site = site

    def run_of(self, request: Request) -> Run:
        return self.site.run_of(request.path_params["id"])

    def screen(self, request: Request) -> Response:
        run = self.run_of(request)
        self.site.look()
        return self.site.page(
            "run.html",
            here="runs",
            run=run,
            about=runs.about(run.folder),
            recipe=report.recipe_rows(run.folder / "recipe.yaml"),
            first_batch=runs.first_batch(run),
            others=[
                (id, self.site.shelf.name_of(path)) for id, path in self.site.shelf.found.runs.items() if id != run.id
            ],
            resume=actions.shown(actions.resume_command(run.folder)),
            has_recipe=(run.folder / "recipe.yaml").is_file(),
        )

    def head(self, request: Request) -> Response:
        run = self.run_of(request)
        return self.site.page("run_head.html", run=run, log=self.log_of(run), **run.drawn.get())

    def drawn(self, request: Request) -> Response:
        return self.site.page("run_charts.html", **self.run_of(request).drawn.get())

    def clips(self, request: Request) -> Response:
        run = self.run_of(request)
        return self.site.page("run_clips.html", run=run, grid=runs.grid(run), obeyed=runs.obeyed(run))

    async def events(self, request: Request) -> Response:
        run = self.run_of(request)
        stream = live.changes(run.folder, lambda: run.drawn.pause_s)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def clip(self, request: Request) -> Response:
        run, column = self.run_of(request), request.path_params["column"]
        if column not in runs.GIVEN:
            whole_number(column)
        return self.site.file(runs.clip_path(run.folder, column, whole_number(request.path_params["number"])))

    def first(self, request: Request) -> Response:
        run, name = self.run_of(request), request.path_params["name"]
        if not any(name == file["name"] for sample in runs.first_batch(run) for file in sample["files"]):
            raise HTTPException(404, "The first batch has no such file.")
        return self.site.file(run.folder / "first_batch" / name)

    def compare(self, request: Request) -> Response:
        self.site.look()
        ids = [request.query_params.get(name, "") for name in ("a", "b")]
        names = [(id, self.site.shelf.name_of(path)) for id, path in self.site.shelf.found.runs.items()]
        if not all(ids):
            return self.site.page("compare.html", here="compare", names=names, ids=ids, pair=None)
        pair = [self.site.run_of(id) for id in ids]
        return self.site.page(
            "compare.html", here="compare", names=names, ids=ids, pair=pair, **compared(pair[0], pair[1])
        )

    def stop(self, request: Request, _: Form) -> Response:
        self.site.must("run")
        run = self.run_of(request)
        actions.stop(run.folder, self.site.store / "logs", run.id)
        return after_post(request, f"/runs/{run.id}")

    def resume(self, request: Request, _: Form) -> Response:
        self.site.must("run")
        run = self.run_of(request)
        actions.resume(run.folder, self.site.store / "logs", run.id)
        return after_post(request, f"/runs/{run.id}")

    def log_of(self, run: Run) -> str | None:
        """The end of what the latest process that was started here for the run has printed."""
        log = actions.latest_log(self.site.store / "logs", run.id) if self.site.run else None
        return None if log is None else actions.end_of(log)


def routes(site: Site) -> list[Route]:
    pages = Pages(site)
    return [
        Route("/runs/{id}", pages.screen),
        Route("/runs/{id}/head", pages.head),
        Route("/runs/{id}/charts", pages.drawn),
        Route("/runs/{id}/clips", pages.clips),
        Route("/runs/{id}/events", pages.events),
        Route("/runs/{id}/clip/{column}/{number}", pages.clip),
        Route("/runs/{id}/first/{name}", pages.first),
        Route("/compare", pages.compare),
        Route("/runs/{id}/stop", posted(pages.stop), methods=["POST"]),
        Route("/runs/{id}/resume", posted(pages.resume), methods=["POST"]),
    ]

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


def routes(site: Site) -> list[Route]:
    def run_of(request: Request) -> Run:
        return site.run_of(request.path_params["id"])

    def screen(request: Request) -> Response:
        run = run_of(request)
        site.look()
        return site.page(
            "run.html",
            here="runs",
            run=run,
            about=runs.about(run.folder),
            recipe=report.recipe_rows(run.folder / "recipe.yaml"),
            first_batch=runs.first_batch(run),
            others=[(id, site.shelf.name_of(path)) for id, path in site.shelf.found.runs.items() if id != run.id],
            resume=actions.shown(actions.resume_command(run.folder)),
            has_recipe=(run.folder / "recipe.yaml").is_file(),
        )

    def head(request: Request) -> Response:
        run = run_of(request)
        return site.page("run_head.html", run=run, log=log_of(run), **run.drawn.get())

    def drawn(request: Request) -> Response:
        return site.page("run_charts.html", **run_of(request).drawn.get())

    def clips(request: Request) -> Response:
        run = run_of(request)
        return site.page("run_clips.html", run=run, grid=runs.grid(run), obeyed=runs.obeyed(run))

    async def events(request: Request) -> Response:
        run = run_of(request)
        stream = live.changes(run.folder, lambda: run.drawn.pause_s)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def clip(request: Request) -> Response:
        run, column = run_of(request), request.path_params["column"]
        if column not in runs.GIVEN:
            whole_number(column)
        return site.file(runs.clip_path(run.folder, column, whole_number(request.path_params["number"])))

    def first(request: Request) -> Response:
        run, name = run_of(request), request.path_params["name"]
        if not any(name == file["name"] for sample in runs.first_batch(run) for file in sample["files"]):
            raise HTTPException(404, "The first batch has no such file.")
        return site.file(run.folder / "first_batch" / name)

    def compare(request: Request) -> Response:
        site.look()
        ids = [request.query_params.get(name, "") for name in ("a", "b")]
        names = [(id, site.shelf.name_of(path)) for id, path in site.shelf.found.runs.items()]
        if not all(ids):
            return site.page("compare.html", here="compare", names=names, ids=ids, pair=None)
        pair = [site.run_of(id) for id in ids]
        return site.page("compare.html", here="compare", names=names, ids=ids, pair=pair, **compared(pair[0], pair[1]))

    def stop(request: Request, _: Form) -> Response:
        site.must("run")
        run = run_of(request)
        actions.stop(run.folder)
        return after_post(request, f"/runs/{run.id}")

    def resume(request: Request, _: Form) -> Response:
        site.must("run")
        run = run_of(request)
        actions.resume(run.folder, site.store / "logs", run.id)
        return after_post(request, f"/runs/{run.id}")

    def log_of(run: Run) -> str | None:
        """The end of what the latest process that was started here for the run has printed."""
        logs = sorted((site.store / "logs").glob(f"*-{run.id}.log"))
        return actions.end_of(logs[-1]) if site.run and logs else None

    return [
        Route("/runs/{id}", screen),
        Route("/runs/{id}/head", head),
        Route("/runs/{id}/charts", drawn),
        Route("/runs/{id}/clips", clips),
        Route("/runs/{id}/events", events),
        Route("/runs/{id}/clip/{column}/{number}", clip),
        Route("/runs/{id}/first/{name}", first),
        Route("/compare", compare),
        Route("/runs/{id}/stop", posted(stop), methods=["POST"]),
        Route("/runs/{id}/resume", posted(resume), methods=["POST"]),
    ]

"""The addresses of a new run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from reeltune.config.parse import read
from reeltune.core.errors import UserError
from reeltune.core.files import whole_file
from reeltune.core.reading import bare_name
from reeltune.page import actions, form
from reeltune.page.alone import alone_in
from reeltune.page.jobs import Jobs
from reeltune.page.site import Form, Site, posted

NAME = "save_as"
LOCATION = "output_dir"  # of a run that was begun, which another must not write into


class Pages:
    def __init__(self, site: Site):
        self.site, self.jobs = site, Jobs()

    def screen(self, request: Request) -> Response:
        found = self.site.look()
        tree: dict[str, Any] = {}
        start = request.query_params.get("from")
        if start:
            recipe = self.site.known("recipes", start)
            tree = read(recipe.path)
            if recipe.path.parent in found.runs.values():
                tree.pop(LOCATION, None)
        return self._form(tree, start)

    def _form(self, tree: dict[str, Any], start: str | None = None) -> Response:
        found = self.site.shelf.found
        return self.site.page(
            "recipe.html",
            here="recipe",
            start=start,
            starts={id: self.site.shelf.name_of(recipe.path) for id, recipe in found.recipes.items()},
            sections=form.fields_of(tree),
            required=form.REQUIRED,
            lists=list(found.lists.values()),
            folder=self.site.shelf.folder,
        )

    def verdict(self, request: Request, given: Form) -> Response:
        """Rules at once; check and plan as soon as they are done with what came before."""
        from reeltune.page import planned  # and torch, and every family: seconds

        tree = form.tree_of(given)
        recipe, problems = planned.sound(tree)
        text, result, wrong = None, None, None
        if recipe is not None:
            text = form.as_yaml(tree)
            machines = planned.machines_of(given)
            key = json.dumps([tree, machines.device, machines.gpus])
            if not self.jobs.busy():
                self.jobs.begin(key, partial(planned.told, recipe, machines, self.site.store / "plans"))
            result, wrong = self.jobs.result(key)
        return self.site.page(
            "recipe_verdict.html",
            problems=wrong.problems if wrong else problems,
            yaml=text,
            told=result,
            waiting=recipe is not None and result is None and wrong is None,
            legend=planned.LEGEND,
        )

    def save(self, request: Request, given: Form) -> Response:
        from reeltune.page import planned  # and torch, and every family: seconds

        self.site.must("edit")
        tree = form.tree_of(given)
        recipe, problems = planned.sound(tree)
        if recipe is None:
            raise UserError("recipe", problems)
        path = self._path(given.get(NAME, ""))
        text = form.as_yaml(tree)
        with alone_in(path.parent):
            if path.exists() and not (path.is_file() and path.read_bytes() == text.encode()):
                raise UserError("save", f"{path.name} is there already, and is another; give another name")
            with whole_file(path) as file:
                file.write(text)
        self.site.look()
        id = self.site.shelf.id_of(path)
        return self.site.page("recipe_saved.html", here="recipe", id=id, path=path, command=self._shown(path), log=None)

    def _path(self, name: str) -> Path:
        """The path of a new file in the served folder itself. Raises UserError for a name that leads elsewhere."""
        name = name.strip() or "recipe.yaml"
        try:
            bare_name(name)
        except ValueError as wrong:
            raise UserError("save", f"{wrong}; give a name without slashes") from None
        if not name.endswith((".yaml", ".yml")) or name.startswith("."):
            raise UserError("save", f"{name!r} is no name of a recipe; let it end in .yaml")
        return self.site.shelf.folder / name

    def start(self, request: Request, _: Form) -> Response:
        self.site.must("run")
        recipe = self.site.known("recipes", request.path_params["id"])
        path = recipe.path
        if path.parent in self.site.shelf.found.runs.values():
            raise UserError("start", "this is the recipe of a run that has begun; resume it on its own page")
        logs, id = self.site.store / "logs", request.path_params["id"]
        log = actions.start(["reeltune", "train", str(path)], logs, id)
        return self._started(path, id, log)

    def _started(self, path: Path, id: str, log: Path) -> Response:
        return self.site.page(
            "recipe_saved.html", here="recipe", id=id, path=path, command=self._shown(path), log=log.name
        )

    def log(self, request: Request) -> Response:
        self.site.must("run")
        log = self._log(request.path_params["name"])
        return self.site.page("log.html", text=actions.end_of(log))

    def _log(self, name: str) -> Path:
        for log in (self.site.store / "logs").glob("*.log"):
            if log.name == name:
                return log
        raise HTTPException(404, "There is no such log.")

    def _shown(self, path: Path) -> str:
        return actions.shown(["reeltune", "train", str(path)])


def routes(site: Site) -> list[Route]:
    pages = Pages(site)
    return [
        Route("/recipe", pages.screen),
        Route("/recipe/verdict", posted(pages.verdict), methods=["POST"]),
        Route("/recipe/save", posted(pages.save), methods=["POST"]),
        Route("/recipe/{id}/start", posted(pages.start), methods=["POST"]),
        Route("/logs/{name}", pages.log),
    ]

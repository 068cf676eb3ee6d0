"""A list as a request asks for it, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request

from reeltune.core.errors import UserError
from reeltune.page import captions
from reeltune.page.found import FoundRecipe
from reeltune.page.jobs import Jobs
from reeltune.page.listing import MEASURED_FILTERS, OWN_FILTERS, Listing, Listings
from reeltune.page.site import Site

if TYPE_CHECKING:
    from reeltune.page.judged import Judged

AT_ONCE = 300  # entries of a list that is measured without being asked
ALONE = "alone"  # in the place of a recipe's id


@dataclass(frozen=True)
class Asked:
    """A list, and by which recipe it is looked at."""

    id: str
    path: Path
    recipes: dict[str, FoundRecipe]  # those that name it as train_data_meta
    by: str  # the id of one of them, or ALONE
    listing: Listing
    key: tuple[Any, ...]  # of its job

    def address(self, below: str = "", **query: Any) -> str:
        told = {"by": self.by, **{name: value for name, value in query.items() if value not in ("", None)}}
        return f"/lists/{self.id}{below}?{urlencode(told)}"


class Lists:
    """Lists and what is known of them."""

    def __init__(self, site: Site):
        self.site, self.listings, self.jobs = site, Listings(), Jobs()

    def asked(self, request: Request) -> Asked:
        id = request.path_params["id"]
        path: Path = self.site.known("lists", id)
        if self.site.shelf.file(path) is None:
            raise HTTPException(404, "The list is gone.")
        known = self.site.shelf.found.recipes
        recipes = {name: recipe for name, recipe in known.items() if is_named(recipe.named("train_data_meta"), path)}
        by = request.query_params.get("by") or next(iter(recipes), ALONE)
        if by != ALONE and by not in recipes:
            raise HTTPException(404, "No such recipe names this list.")
        folder = self._folder(path, by, known)
        status = path.stat()
        key = id, by, status.st_ino, status.st_mtime_ns, status.st_size
        return Asked(id, path, recipes, by, self.listings.get(path, folder), key)

    def _folder(self, path: Path, by: str, known: dict[str, FoundRecipe]) -> Path:
        """What the list's paths are relative to: as a recipe says that names it, else where it lies."""
        original = path.with_name(path.name.replace(captions.EDITED, ""))
        named = [
            recipe.named("train_data_dir")
            for id, recipe in known.items()
            if by in (id, ALONE)
            and any(
                is_named(recipe.named(setting), one)
                for setting in ("train_data_meta", "validation_data_meta")
                for one in (path, original)
            )
        ]
        holds = self.site.shelf.holds
        return next((one for one in named if one is not None and one.is_dir() and holds(one)), path.parent)

    def store(self, asked: Asked) -> Path:
        return self.site.store / f"{asked.id}-{asked.by}"

    def judge(self, asked: Asked) -> None:
        """Begins to measure, unless that has begun."""
        store, folder = self.store(asked), Path(asked.listing.folder.path)

        def act() -> Judged:
            from reeltune.page.judged import by_recipe, by_scan  # and torch, and every family: seconds

            if asked.by == ALONE:
                return by_scan(asked.path, folder, store)
            return by_recipe(asked.recipes[asked.by].path, store, self.site.shelf.holds)

        self.jobs.begin(asked.key, act)

    def judged(self, asked: Asked) -> tuple[Judged | None, UserError | None]:
        known_by_run = asked.by != ALONE and (asked.recipes[asked.by].path.parent / "index").is_dir()
        if len(asked.listing.entries) <= AT_ONCE or known_by_run:
            self.judge(asked)
        return self.jobs.result(asked.key)

    def kept(self, asked: Asked, judged: Judged | None, show: str, words: str) -> np.ndarray:
        """The entries that a filter and a search leave."""
        own = asked.listing
        if show in MEASURED_FILTERS and judged is not None:
            entries = judged.kept.get(show, np.array([], np.int64))
        elif show == "all":
            entries = np.arange(len(own.entries))
        elif show in OWN_FILTERS:
            entries = own.kept[show]
        else:
            raise HTTPException(404, "There is no such filter here.")
        return own.searched(entries.tolist(), words) if words else entries


def is_named(named: Path | None, path: Path) -> bool:
    return named is not None and named.resolve() == path.resolve()

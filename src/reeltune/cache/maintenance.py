"""`reeltune cache verify` and `reeltune cache prune`."""

from __future__ import annotations

from pathlib import Path

from reeltune.cache import store as files
from reeltune.cache.entries import is_there, items_of, keys_of
from reeltune.cache.keys import Keys
from reeltune.cache.store import Store
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.run.data import gather
from reeltune.run.model import choose_family


def verify(recipe: Recipe) -> str:
    """Reads every byte of the cache. Returns one line if all is as it was written and nothing is missing.

    Raises UserError for what is not; damaged shards are then set aside, so that `reeltune cache` makes them anew.
    """
    folder = Path(str(recipe.cache.cache_folder))
    problems = [f"{line}; run reeltune cache, which encodes it again" for line in files.set_aside_damaged(folder)]
    _, asked = _asked_for(recipe)
    store = Store(folder)
    missing = [key for key, content in asked.items() if not is_there(store, key, content)]
    if missing:
        problems.append(f"{len(missing)} of {len(asked)} entries are missing; run reeltune cache")
    if problems:
        raise UserError(str(folder), problems)
    unread = sum(key in store.failed for key in asked)
    return f"{folder}: {len(asked) - unread} entries, all whole; {unread} of files that cannot be read"


def prune(recipe: Recipe) -> str:
    """Deletes what the recipe does not ask for. Raises UserError if a process is writing to the cache, or there is
    none."""
    folder = Path(str(recipe.cache.cache_folder))
    if not folder.is_dir():
        raise UserError("cache_folder", f"{folder} is no folder; give that of a cache, or fill it by reeltune cache")
    if not (folder / files.MANIFEST).is_dir():
        raise UserError("cache_folder", f"{folder} holds no cache; give one that does, or fill it by reeltune cache")
    keys, asked = _asked_for(recipe)
    freed_bytes = files.prune(folder, asked.keys(), keys.facts)
    return f"{folder}: {freed_bytes / 1e9:.3g} GB freed; {len(Store(folder).entries)} entries stay"


def _asked_for(recipe: Recipe) -> tuple[Keys, dict[str, str]]:
    """(keys, each entry's key with the content of its files)."""
    family, mode, _ = choose_family(recipe)
    inputs, keys = gather(recipe, family, mode), keys_of(recipe, family, mode)
    asked = {keys.null: ""}
    for item in items_of(keys, inputs):
        asked |= {item.clip: item.content, item.text: item.text_content}
    return keys, asked

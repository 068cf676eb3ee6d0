"""Where what saves time is remembered for all of a user's runs. Nothing there is needed.  (no torch)"""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path | None:
    """Where this user's caches belong (XDG Base Directory Specification,
    https://specifications.freedesktop.org/basedir-spec); None: there is no home."""
    said = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(said):  # a relative one is to be ignored
        return Path(said) / "reeltune"
    home = os.path.expanduser("~")
    return Path(home) / ".cache/reeltune" if os.path.isabs(home) else None

"""Imports of large libraries, without what takes them long and is not used here (no torch)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

LATER = ("bitsandbytes",)  # PEFT and diffusers import it whenever it is installed, and it torch's whole compiler


@contextmanager
def lean_imports() -> Iterator[None]:
    """Within, packages of LATER are imported once something of theirs is asked for, and no garbage is looked for: all
    that is imported stays. Nor is it later on in what was imported with torch; before torch nothing large is there
    that would stay with it.

    After torch, diffusers' Wan and PEFT take 0.6 of the CPU time; from then to a run's first step on 100,000 rows it
    is 0.4 (measured, 2026-11-26 and 27, torch 2.13, diffusers 0.42).
    """
    stand_ins = [_Later(name) for name in LATER if name not in sys.modules and find_spec(name)]
    sys.modules.update({one.__name__: one for one in stand_ins})
    collects, begins = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if begins and "torch" in sys.modules:
            gc.freeze()
        if collects:
            gc.enable()
        for one in stand_ins:
            one.make_way()


class _Later(ModuleType):
    """Stands for a package where it is only named."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = find_spec(name)  # by which others see that it is installed

    def make_way(self) -> None:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # which an import of a module below it asks for
            raise AttributeError(name)
        self.make_way()
        return getattr(import_module(self.__name__), name)

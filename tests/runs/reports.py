"""Runs without their report, which has tests of its own and takes longer to draw than a tiny run to train."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module", autouse=True)
def reports() -> Iterator[Callable[..., AbstractContextManager[None]]]:
    """Runs in this process leave no report.html, but those within `with reports():`; with `curves=False` one of which
    the curves, which take longest, are left out."""
    from reeltune.training import duties  # here: tests without runs need not wait for its libraries

    real = duties.report

    @contextmanager
    def drawn(*, curves: bool = True) -> Iterator[None]:
        duties.report = real
        try:
            with pytest.MonkeyPatch.context() as patch:
                if not curves:
                    patch.setattr(real, "curves", lambda metrics: [])
                yield
        finally:
            duties.report = none

    none = duties.report = SimpleNamespace(write=lambda out: out / "report.html")
    yield drawn
    duties.report = real

"""No reports."""

from tests.runs.reports import reports  # noqa: F401 - for all tests here

"""No reports; and nothing of what torch tells of each tensor that it reads, which takes longer than to read it."""

import logging

from tests.runs.reports import reports  # noqa: F401 - for all tests here

logging.getLogger("c10d-NullHandler-dcp_logger").disabled = True  # torch 2.13; pytest keeps all lines of others

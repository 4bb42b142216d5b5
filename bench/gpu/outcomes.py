"""A pytest plugin that writes each test's outcome at once, so that it survives a crash.

    FASTSAE_OUTCOMES=FILE pytest -p bench.gpu.outcomes

writes a line of JSON per test: its node ID; passed, failed or skipped; and the error.
"""

import json
import os
from pathlib import Path

import pytest

worker = False
"""Whether this process is a worker of pytest-xdist. The environment does not tell: a test that runs
in a worker may start pytest itself, as this module's tests do."""


def pytest_configure(config: pytest.Config) -> None:
    global worker
    worker = hasattr(config, "workerinput")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if worker or (report.when != "call" and report.passed):
        return  # workers report to the process that started them, which writes their outcomes
    error = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        error = (crash.message if crash else str(report.longrepr)).strip()[:300]
    with Path(os.environ["FASTSAE_OUTCOMES"]).open("a") as file:
        print(json.dumps([report.nodeid, report.outcome, error]), file=file)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End a worker that lost its CUDA context: all later tests in it would fail too."""
    import torch

    if worker and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)

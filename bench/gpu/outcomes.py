"""A pytest plugin that writes each test's outcome as soon as it is known, whatever happens next.

    FASTSAE_OUTCOMES=FILE pytest -p bench.gpu.outcomes

leaves a line of JSON per test: its node id, passed, failed or skipped, and the error.
"""

import json
import os
from pathlib import Path

import pytest

worker = False
"""Whether pytest-xdist started this process. Its environment does not say: a test of a worker may
start pytest itself, as those of this module do."""


def pytest_configure(config: pytest.Config) -> None:
    global worker
    worker = hasattr(config, "workerinput")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if worker or (report.when != "call" and report.passed):
        return  # the process that started the workers hears of all their tests
    error = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        error = (crash.message if crash else str(report.longrepr)).strip()[:300]
    with Path(os.environ["FASTSAE_OUTCOMES"]).open("a") as file:
        print(json.dumps([report.nodeid, report.outcome, error]), file=file)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A test that lost the GPU's context ends its worker: in it, all others would fail too."""
    import torch

    if worker and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)

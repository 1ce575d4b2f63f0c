"""pytest -p benchmarks.gpu.pytest_plugin: why a test failed at once; SIGINT ends the run with summary and XML.

For scripts/gpu_check.sh, which cuts a step that takes too long: pytest itself gives its reasons at the end only. A
process whose kernel hangs never comes back to Python, is killed, and leaves no XML: then these lines are all there is.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest

from benchmarks.gpu.report import REASON, first_line


class Reasons:
    def __init__(self, config: pytest.Config) -> None:
        self.terminal: Any = config.pluginmanager.get_plugin("terminalreporter")

    @pytest.hookimpl(trylast=True)  # behind the line with the test's outcome
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.terminal:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else report.longreprtext
            self.terminal.ensure_newline()
            self.terminal.write_line(f"{REASON}\t{report.nodeid}\t{first_line(why)}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reasons(config))
    # bash starts a background job with SIGINT ignored, and Python leaves that as it is.
    signal.signal(signal.SIGINT, interrupt)


def interrupt(*_: Any) -> None:
    """Once: timeout sends it to the process and to its group, and the second would cut the summary."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt

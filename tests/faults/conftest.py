"""Prints the table of faults: how often each was tried, how often survived."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A row a fault; a test that failed is a try that was not survived."""
    tries: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if "test_run_faults" not in report.nodeid or report.when != "call":
                continue
            seen = [value for name, value in report.user_properties if name == "fault"]
            if outcome == "failed":
                seen.append((report.nodeid.partition("::")[2], False))
            for fault, well in seen:
                tries[fault] += 1
                survived[fault] += bool(well)
    if tries:
        terminalreporter.section("faults")
        for fault in sorted(tries):
            terminalreporter.write_line(f"{fault:<44} {tries[fault]:>4} tries  {survived[fault]:>4} survived")

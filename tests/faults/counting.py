"Each test counts what it tried; the counts are the table that `python -m tests.faults` ends with."
import os
from collections import Counter

import pytest

ASKED = os.environ.get('LMNB_FAULTS')  # short or long, by `python -m tests.faults`; None in an ordinary run of pytest
TRIED, HELD, FAILED = Counter(), {}, Counter()


class Row:
    "A row of the table: a kind of fault, and what must hold; tests of the same fault add to one row."
    def __init__(self, test): self.test, self.fault = test, None

    def __call__(self, fault, held):
        self.fault = fault
        TRIED[fault] += 0
        HELD[fault] = held

    def tried(self, n=1): TRIED[self.fault] += n


@pytest.fixture
def row(request):
    r = Row(request.node)
    yield r
    assert r.fault, 'a test of a fault names it'
    if request.node.failed: FAILED[r.fault] += 1


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.when == 'call': item.failed = report.failed


@pytest.fixture
def times():
    "So many tries: few in CI, many by `--long`."
    return lambda few, many: many if ASKED == 'long' else few


def pytest_terminal_summary(terminalreporter):
    if not ASKED: return
    terminalreporter.write_line('\n| fault | tried | lost or wrong | what must hold |\n|---|---|---|---|')
    for fault, n in TRIED.items(): terminalreporter.write_line(f'| {fault} | {n:,} | {FAILED[fault] or 0} | {HELD[fault]} |')

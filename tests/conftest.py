"""Options of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cogvid")
    group.addoption("--fuzz-cases", type=int, default=100, help="how many random cases tests/parity/test_fuzz.py runs")
    group.addoption("--fuzz-start", type=int, default=0, help="the number of the first of them")
    group.addoption("--screenshots", metavar="DIR", help="keep pictures of the pages that tests/ui opens there")

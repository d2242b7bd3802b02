"""Options of the whole suite, and which cases the default run takes of tests with many."""

from collections import Counter

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cogvid")
    group.addoption("--fuzz-cases", type=int, default=60, help="how many random cases tests/parity/test_fuzz.py runs")
    group.addoption("--fuzz-start", type=int, default=0, help="the number of the first of them")
    group.addoption("--screenshots", metavar="DIR", help="keep pictures of the pages that tests/ui opens there")


@pytest.hookimpl(tryfirst=True)  # before the selection by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make the cases of a test that is marked `every(n)` slow, but for the first of each n."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("every")
        if mark is None:
            continue
        name = item.nodeid.partition("[")[0]
        if seen[name] % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[name] += 1

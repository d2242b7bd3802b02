"""Processes that tests share: `ranks(2)` are the same two in all tests of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    kept: dict[int, Ranks] = {}
    with ExitStack() as stack:

        def of(count: int) -> Ranks:
            if count not in kept:
                kept[count] = stack.enter_context(Ranks(count))
            return kept[count]

        yield of

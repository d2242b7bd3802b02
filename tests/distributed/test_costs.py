"""Bytes that each process moves, by formula; `test_transformer.py` counts them."""

from __future__ import annotations

import pytest

from cogvid.parallel.costs import Traffic, bytes_of_block, bytes_of_gather, ring_bytes, ring_pieces, ulysses_bytes
from cogvid.parallel.mesh import pieces
from cogvid.weights.parallel_option import Parallel

SPLITS = [Parallel(cfg, ulysses, ring) for cfg in (1, 2) for ulysses in (1, 3, 4) for ring in (1, 2, 5)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(2, 17776, 48), (6, 101, 30), (1, 61, 5)])
def test_what_is_sent_is_received(split: Parallel, batch: int, tokens: int, heads: int) -> None:
    for function, last in ((ulysses_bytes, (heads, 64, 2)), (ring_bytes, (heads, 64, 2)), (bytes_of_gather, (77, 4))):
        each = [function(split, rank, batch, tokens, *last) for rank in range(split.devices)]
        assert sum(traffic.sent for traffic in each) == sum(traffic.received for traffic in each)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_ulysses_group_sends_no_more_than_four_times_its_tokens_of_other_heads(split: Parallel) -> None:
    batch, tokens, heads = 2, 1001, 30
    total = sum(ulysses_bytes(split, rank, batch, tokens, heads, 8, 2).sent for rank in range(split.devices))
    parts, by_head = pieces(tokens, split.ring * split.ulysses), pieces(heads, split.ulysses)
    formula = sum(
        4 * (stop - start) * (heads - (by_head[i % split.ulysses][1] - by_head[i % split.ulysses][0]))
        for i, (start, stop) in enumerate(parts)
    )
    assert total == batch * formula * 8 * 2


def test_bytes_of_known_splits() -> None:
    """By hand: 7 tokens are pieces of 4 and 3, 5 heads of 3 and 2; 2 bytes an element, heads of 8 channels."""
    ulysses = Parallel(ulysses=2)
    first = bytes_of_block(ulysses, 0, 1, 7, 5, 8, 2)
    assert first == Traffic(16 * (3 * 4 * 2 + 3 * 3), 16 * (4 * 2 + 3 * 3 * 3))
    ring = Parallel(ring=2)
    assert bytes_of_block(ring, 0, 1, 7, 5, 8, 2) == Traffic(16 * 2 * 4 * 5, 16 * 2 * 3 * 5)
    assert bytes_of_gather(ring, 0, 1, 7, 40, 2) == Traffic(2 * 40 * 4, 2 * 40 * 3)
    assert bytes_of_gather(Parallel(cfg=2), 1, 1, 7, 40, 2) == Traffic(0, 2 * 40 * 7)
    assert bytes_of_block(Parallel(cfg=2), 0, 2, 7, 5, 8, 2) == Traffic(0, 0)


def test_ring_pieces_are_whole_groups() -> None:
    assert ring_pieces(Parallel(ulysses=2, ring=2), 7) == [(0, 4), (4, 7)]
    assert ring_pieces(Parallel(ring=3), 7) == pieces(7, 3)

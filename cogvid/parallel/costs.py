"""How the work of one video is divided over processes, and how many bytes each sends for it. Imports no torch.

Letters: B rows of the batch that a process computes, N tokens of the whole sequence, n those of its piece, H heads, h
those that it computes in attention, hd head width, D = H * hd, U and R the sizes of the split's ulysses and ring. A
message that a process would send to itself is not sent.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from cogvid.weights.parallel_option import Parallel


class Traffic(NamedTuple):
    """Bytes that one process sends to others and receives from them."""

    sent: int
    received: int

    def plus(self, other: Traffic) -> Traffic:
        """Return the sum of both."""
        return Traffic(self.sent + other.sent, self.received + other.received)


def pieces(total: int, count: int) -> list[tuple[int, int]]:
    """Cut `total` into `count` pieces, (start, stop) each, that differ by one at most; the larger ones come first."""
    size, larger = divmod(total, count)
    starts = [index * size + min(index, larger) for index in range(count + 1)]
    return list(itertools.pairwise(starts))


def sizes(total: int, count: int) -> list[int]:
    """Return the sizes of the pieces."""
    return [stop - start for start, stop in pieces(total, count)]


def place_of(split: Parallel, rank: int) -> tuple[int, int, int]:
    """Return the indices of a rank in cfg, ring and ulysses; neighbouring ranks share a Ulysses group."""
    rest, ulysses = divmod(rank, split.ulysses)
    cfg, ring = divmod(rest, split.ring)
    return cfg, ring, ulysses


def rows_of(split: Parallel, rank: int, batch: int) -> int:
    """Return how many rows of the batch a rank computes; 0 where there are fewer rows than groups."""
    return sizes(batch, split.cfg)[place_of(split, rank)[0]]


def ring_pieces(split: Parallel, tokens: int) -> list[tuple[int, int]]:
    """Return the tokens (start, stop) of each Ulysses group: the pieces of its processes, which are neighbours."""
    found = pieces(tokens, split.ring * split.ulysses)
    return [(found[i][0], found[i + split.ulysses - 1][1]) for i in range(0, len(found), split.ulysses)]


def ulysses_bytes(
    split: Parallel, rank: int, batch: int, tokens: int, heads: int, head_dim: int, itemsize: int
) -> Traffic:
    """Return what the four all-to-alls of one block move, of q, k, v and the output.

    Let m be the tokens of the Ulysses group. A rank sends, of q, k and v, its tokens with the heads of the others, and
    of the output the tokens of the others with its heads:

        sent      B * hd * (3 * n * (H - h) +     (m - n) * h) elements
        received  B * hd * (    n * (H - h) + 3 * (m - n) * h) elements

    Over the ranks of a group, n * (H - h) and (m - n) * h have the same sum. So the group sends and receives the sum of
    4 * B * n * (H - h) * hd.

    batch: rows before they are divided. itemsize: bytes of an element.
    """
    _, ring, ulysses = place_of(split, rank)
    start, stop = ring_pieces(split, tokens)[ring]
    own = sizes(tokens, split.ring * split.ulysses)[ring * split.ulysses + ulysses]
    computed = sizes(heads, split.ulysses)[ulysses]
    away, back = own * (heads - computed), (stop - start - own) * computed
    unit = rows_of(split, rank, batch) * head_dim * itemsize
    return Traffic(unit * (3 * away + back), unit * (away + 3 * back))


def ring_bytes(
    split: Parallel, rank: int, batch: int, tokens: int, heads: int, head_dim: int, itemsize: int
) -> Traffic:
    """Return what the ring of one block moves: keys and values, in R - 1 messages of neighbours.

    A rank passes on all ring pieces but the one that the next rank began with, and gets all but its own. With m_i for
    the tokens of the i-th ring piece and i for the rank's:

        sent      2 * B * (N - m_(i + 1)) * h * hd elements
        received  2 * B * (N - m_i) * h * hd elements
    """
    _, ring, ulysses = place_of(split, rank)
    groups = [stop - start for start, stop in ring_pieces(split, tokens)]
    unit = 2 * rows_of(split, rank, batch) * sizes(heads, split.ulysses)[ulysses] * head_dim * itemsize
    return Traffic(unit * (tokens - groups[(ring + 1) % split.ring]), unit * (tokens - groups[ring]))


def bytes_of_block(
    split: Parallel, rank: int, batch: int, tokens: int, heads: int, head_dim: int, itemsize: int
) -> Traffic:
    """Return what a rank moves in one block: the sum of both."""
    arguments = (split, rank, batch, tokens, heads, head_dim, itemsize)
    return ulysses_bytes(*arguments).plus(ring_bytes(*arguments))


def bytes_of_gather(split: Parallel, rank: int, batch: int, tokens: int, width: int, itemsize: int) -> Traffic:
    """Return what a rank moves after the last block, when every process gets the whole `[batch, N, D]`.

    The pieces of the Ulysses group, then those of the ring, then the rows. With m for the tokens of the ring piece:

        sent      B * D * (n * (U - 1) + m * (R - 1)), and with cfg=2 also B * N * D elements
        received  B * D * (N - n), and with cfg=2 also (batch - B) * N * D elements
    """
    _, ring, ulysses = place_of(split, rank)
    rows = rows_of(split, rank, batch)
    start, stop = ring_pieces(split, tokens)[ring]
    own = sizes(tokens, split.ring * split.ulysses)[ring * split.ulysses + ulysses]
    sent = rows * (own * (split.ulysses - 1) + (stop - start) * (split.ring - 1) + tokens * (split.cfg - 1))
    received = rows * (tokens - own) + (batch - rows) * tokens
    return Traffic(sent * width * itemsize, received * width * itemsize)

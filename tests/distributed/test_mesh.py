"""How work is split over processes, and their groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cogvid.parallel.mesh import gather, make_mesh, pieces
from cogvid.weights.parallel_option import Parallel, best_split, parse_parallel
from tests.distributed.ranks import Ranks


@pytest.mark.parametrize(("total", "count"), [(17, 2), (3, 4), (0, 3), (17776, 6), (5, 5)])
def test_pieces_cover_everything_and_differ_by_one_at_most(total: int, count: int) -> None:
    found = pieces(total, count)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == total
    sizes = [stop - start for start, stop in found]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_a_split_is_read_as_it_is_printed() -> None:
    split = Parallel(cfg=2, ulysses=3, ring=4)
    assert parse_parallel(str(split)) == parse_parallel(split) == split
    assert parse_parallel("ring=2") == Parallel(ring=2)
    assert parse_parallel(None) is None
    assert split.devices == 24


@pytest.mark.parametrize("value", ["", "cfg", "cfg=2,cfg=2", "heads=2", "cfg=-1", 4, "cfg=2;ring=2"])
def test_what_is_no_split_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^parallel: got .*, want a Parallel or cfg=N,ulysses=N,ring=N"):
        parse_parallel(value)


@pytest.mark.parametrize("split", [{"cfg": 3}, {"ulysses": 0}, {"ring": True}])
def test_an_illegal_split_is_refused(split: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^parallel: \w+: got .*, want an integer"):
        Parallel(**split)


@pytest.mark.parametrize(
    ("devices", "heads", "guided", "per_node", "split"),
    [
        (1, 30, True, None, Parallel()),
        (2, 30, True, None, Parallel(cfg=2)),
        (2, 30, False, None, Parallel(ulysses=2)),
        (3, 30, True, None, Parallel(ulysses=3)),
        (8, 48, True, None, Parallel(cfg=2, ulysses=4)),
        (16, 48, True, 8, Parallel(cfg=2, ulysses=8)),
        (64, 48, True, 8, Parallel(cfg=2, ulysses=8, ring=4)),
        (128, 30, False, None, Parallel(ulysses=16, ring=8)),
        (7, 4, True, None, Parallel(ring=7)),
    ],
)
def test_the_best_split(devices: int, heads: int, guided: bool, per_node: int | None, split: Parallel) -> None:
    assert best_split(devices, heads, guided=guided, per_node=per_node) == split
    assert split.devices == devices


@pytest.mark.slow
def test_groups_and_gathering(ranks: Callable[[int], Ranks]) -> None:
    found = ranks(4).run(_groups)
    assert [each["piece"] for each in found] == [0, 1, 0, 1]
    assert [each["cfg"] for each in found] == [0, 0, 1, 1]
    assert all(each["gathered"] == list(range(3)) for each in found)


def _groups() -> dict[str, object]:
    mesh = make_mesh(Parallel(cfg=2, ulysses=2), torch.device("cpu"))
    start, stop = pieces(3, 2)[mesh.piece]
    whole = gather(torch.arange(start, stop)[None], 1, [2, 1], mesh.group("ulysses"))
    return {"piece": mesh.piece, "cfg": mesh.index("cfg"), "gathered": whole[0].tolist()}

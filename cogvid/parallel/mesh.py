"""The processes that make one video together, started by torchrun: their groups, and which part each of them has.

Every process runs the same program on the same inputs. Rank 0 is the one that writes and prints.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup, init_device_mesh

from cogvid.weights.parallel_option import Parallel

_DIMENSIONS = ("cfg", "ring", "ulysses")


@dataclass(frozen=True, eq=False)
class Mesh:
    """The processes of a run and their groups. split: how they share the work. device_mesh: over cfg, ring, ulysses.

    A rank's piece of the sequence is `ring index * ulysses + ulysses index`, so that the pieces of a Ulysses group are
    neighbours.
    """

    split: Parallel
    device_mesh: DeviceMesh

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return self.split.devices

    @property
    def world(self) -> ProcessGroup:
        """All processes."""
        group = dist.group.WORLD
        assert group is not None
        return group

    def group(self, name: str) -> ProcessGroup:
        """Return the processes that differ from this one in "cfg", "ring" or "ulysses" alone."""
        return self.device_mesh.get_group(name)

    def index(self, name: str) -> int:
        """Return the index of this process in `group(name)`."""
        return self.device_mesh.get_local_rank(name)

    @property
    def piece(self) -> int:
        """The index of this rank's piece of the sequence, of `ulysses * ring` pieces."""
        return self.index("ring") * self.split.ulysses + self.index("ulysses")


def make_mesh(split: Parallel, device: torch.device) -> Mesh:
    """Make the groups of a split over all processes, whose process group was begun; all of them must call it."""
    shape = (split.cfg, split.ring, split.ulysses)
    return Mesh(split, init_device_mesh(device.type, shape, mesh_dim_names=_DIMENSIONS))


def pieces(total: int, count: int) -> list[tuple[int, int]]:
    """Cut `total` into `count` pieces, (start, stop) each, that differ by one at most; the larger ones come first."""
    size, larger = divmod(total, count)
    starts = [index * size + min(index, larger) for index in range(count + 1)]
    return list(itertools.pairwise(starts))


def gather(x: Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> Tensor:
    """Concatenate the tensors of all processes of a group along `dim`, where they have these sizes; on each process.

    x: any strides; the other dimensions are the same on all processes. Empty tensors are fine.
    """
    x, largest = x.movedim(dim, 0), max(sizes)
    padded = x.new_zeros(largest, *x.shape[1:])  # gloo gathers equal sizes alone
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)

"""The processes that make one video together, started by torchrun: their groups, and which part each of them has.

Every process runs the same program on the same inputs. Rank 0 is the one that writes and prints.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup, init_device_mesh

from cogvid.parallel.costs import pieces as pieces
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


def world_size() -> int:
    """Return how many processes torchrun started; 1 without it. It imports nothing that waits for the others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_mesh(split: Parallel, device: torch.device) -> Mesh:
    """Make the groups of a split over all processes, whose process group was begun; all of them must call it."""
    shape = (split.cfg, split.ring, split.ulysses)
    return Mesh(split, init_device_mesh(device.type, shape, mesh_dim_names=_DIMENSIONS))


def gather(x: Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> Tensor:
    """Concatenate the tensors of all processes of a group along `dim`, where they have these sizes; on each process.

    x: any strides; the other dimensions are the same on all processes. Empty tensors are fine. The result is
    contiguous. A process sends its tensor once to each of the others, and nothing else.

    Raises:
        ValueError: x needs a gradient.
    """
    check_no_gradients(x)
    if len(sizes) == 1:
        return x.contiguous()
    x = x.movedim(dim, 0)
    whole = x.new_empty(sum(sizes), *x.shape[1:])
    # Not `all_gather`, which gloo has for equal sizes alone.
    copies = x.expand(len(sizes), *x.shape).flatten(0, 1).contiguous()
    dist.all_to_all_single(whole, copies, sizes, [len(x)] * len(sizes), group=group)
    return whole.movedim(0, dim).contiguous()


def check_no_gradients(x: Tensor) -> None:
    """Raise ValueError if x needs a gradient: nothing goes back through what processes exchange."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("gradients: got a tensor that needs one on several processes, want torch.no_grad()")

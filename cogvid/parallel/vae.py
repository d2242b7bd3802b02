"""The VAE on all processes of a mesh, by rows of the picture: the same numbers to rounding, not blended tiles.

A rank has some rows of latents (`pieces(h, N)`) and the pixels that belong to them, and so a piece of every activation.
What looks beyond it gets that from the other ranks:

    CausalConv3d  the rows above and below it            Downsample  the row below it
    Upsample      the rows above and below its input     norms       the mean and variance of each channel on each rank

A convolution runs on the rank's own rows, with zeros around them, while its neighbours' rows are on their way. Then the
first and the last row are computed again, with these rows. So nothing large is copied. The past frames that the two
rows need are kept from chunk to chunk like the others.

Bytes: for an input `[B, C, T, rows, W]`, each border between two ranks is crossed by `2 * B * C * T * W` elements, one
row each way; at a Downsample by half of that. For a norm, each rank sends `3 * B * C` fp64 numbers to each other rank.

A rank without rows (N > h) runs the same modules on tensors of no rows: it takes part in all norms and in gathering.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cogvid import ops as plain
from cogvid.models.tiling import TiledVAE
from cogvid.models.vae import LATENT_CHUNK, LAYOUT, VAE, CausalConv3d, ConvCache, Downsample, Upsample, chunk_sizes
from cogvid.ops import Ops
from cogvid.parallel.mesh import Mesh, gather, pieces


def split_vae(vae: VAE, mesh: Mesh) -> None:
    """Let all processes of a mesh share the work of `encode`, `decode` and `decode_chunks`.

    Each process must call them with the same arguments; if shapes differ, each raises. They keep their signatures and
    return the whole result on each process, the same bits. A chunk is yielded on each before the next one is begun.
    Modules keep their weights, names and hooks; what a hook sees are the rows of its process. A backward pass raises.

    Raises:
        ValueError: the VAE is tiled, compiled, split already, or has norms of the user's own.
    """
    if isinstance(vae, TiledVAE):
        raise ValueError(f"vae_tiling: got it on {mesh.size} devices, want one of the two, as both cut the picture")
    if hasattr(vae.decoder.forward, "_torchdynamo_orig_callable"):
        raise ValueError(f"compile: got a compiled VAE on {mesh.size} devices, want one of the two")
    if type(vae) is not VAE:
        raise ValueError(f"vae: got a {type(vae).__name__}, want a VAE that is not split")
    ops = vae.ops
    _ = _over_rows(ops, mesh)  # it may raise; nothing is changed yet
    for module in vae.modules():
        # The class alone changes, so that weights, names and hooks stay as they are.
        module.__class__ = _SPLIT.get(type(module), type(module))
    assert isinstance(vae, SplitVAE)
    vae.mesh = mesh
    vae.set_ops(ops)


class SplitVAE(VAE):
    """A VAE whose work the processes of a mesh share; `split_vae` makes one of a VAE."""

    mesh: Mesh

    def set_ops(self, ops: Ops) -> None:
        """Run these operations from now on, the norms with statistics over all rows.

        Raises:
            ValueError: its norms are neither those of `Ops.torch()` nor those of `Ops.triton()`.
        """
        super().set_ops(_over_rows(ops, self.mesh))
        self._ops = ops

    def _encode_chunks(self, x: Tensor, size: int) -> Iterator[Tensor]:
        return self._chunks("x", x, size, self.encoder, self.config.spatial_compression_ratio, 1)

    def _decode_chunks(self, z: Tensor) -> Iterator[Tensor]:
        return self._chunks("z", z, LATENT_CHUNK, self.decoder, 1, self.config.spatial_compression_ratio)

    def _chunks(self, name: str, x: Tensor, size: int, part: nn.Module, before: int, after: int) -> Iterator[Tensor]:
        """Yield the whole chunks that a part makes. before, after: rows of its input and output per row of latents."""
        _check_same(name, x, self.mesh)
        rows = Rows(x.shape[3] // before, self.mesh)
        cache, (start, stop) = SplitCache(rows), rows.pieces[self.mesh.rank]
        sizes = [(stop - start) * after for start, stop in rows.pieces]
        mine = x[:, :, :, start * before : stop * before]
        for chunk in mine.split(chunk_sizes(x.shape[2], size), dim=2):
            with torch.no_grad():
                y = part(chunk.contiguous(memory_format=LAYOUT), cache)
                y = gather(y, 3, sizes, self.mesh.world).contiguous()
            yield _ForwardOnly.apply(y, x, *self.parameters()) if torch.is_grad_enabled() else y


class Rows:
    """Which rows of latents each rank has, and the exchange of rows between neighbours. height: of the latents.

    above, below: the ranks that have the rows next to those of this rank; None at the edge of the picture.
    """

    def __init__(self, height: int, mesh: Mesh) -> None:
        self.pieces = pieces(height, mesh.size)
        self._group = mesh.world
        ranks = [rank for rank, (start, stop) in enumerate(self.pieces) if start < stop]  # the first ones
        self.above = mesh.rank - 1 if mesh.rank in ranks[1:] else None
        self.below = mesh.rank + 1 if mesh.rank in ranks[:-1] else None

    def exchange(self, x: Tensor, *, down: bool = True) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begin to send the first row of x `[B, C, T, rows, W]` up and its last row down.

        down: False sends nothing down.

        Returns:
            Function that waits, and returns the rows above and below, `[B, C, T, 1, W]` each; zeros if there is none.
        """
        first, last = (row.movedim(1, -1).contiguous() for row in (x[:, :, :, :1], x[:, :, :, -1:]))
        above, below = torch.zeros_like(first), torch.zeros_like(last)
        transfers = []
        if self.above is not None:
            transfers.append(dist.P2POp(dist.isend, first, self.above, self._group))
        if self.below is not None:
            transfers.append(dist.P2POp(dist.irecv, below, self.below, self._group))
        if self.below is not None and down:
            transfers.append(dist.P2POp(dist.isend, last, self.below, self._group))
        if self.above is not None and down:
            transfers.append(dist.P2POp(dist.irecv, above, self.above, self._group))
        begun = dist.batch_isend_irecv(transfers) if transfers else []

        def wait() -> tuple[Tensor, Tensor]:
            for each in begun:
                each.wait()
            transfers.clear()  # which kept what was sent in memory until here
            return above.movedim(-1, 1), below.movedim(-1, 1)

        return wait


class SplitCache(ConvCache):
    """The past frames of one `encode` or `decode`, and its rows.

    edges: what `frames` is to the first and the last row of a rank, each with the row on either side.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.edges: dict[nn.Module, Tensor] = {}  # [2 * B, C, 2, 3, width] each

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(edges.nbytes for edges in self.edges.values())


class SplitCausalConv3d(CausalConv3d):
    """`CausalConv3d` of the rows of a rank."""

    def forward(self, x: Tensor, cache: ConvCache) -> Tensor:
        assert isinstance(cache, SplitCache)
        if x.shape[3] == 0:
            return x.new_empty(len(x), self.out_channels, *x.shape[2:])
        neighbours = cache.rows.exchange(x)
        y = super().forward(x, cache)
        above, below = neighbours()
        # Three rows for each of the two. If the rank has one row alone, they are the same three.
        top = torch.cat([above, x[:, :, :, :2], below], dim=3)[:, :, :, :3]
        bottom = torch.cat([above, x[:, :, :, -2:], below], dim=3)[:, :, :, -3:]
        edges = torch.cat([top, bottom])
        past = cache.edges.get(self, edges[:, :, :1].expand(-1, -1, 2, -1, -1))
        edges = torch.cat([past, edges], dim=2)
        cache.edges[self] = edges[:, :, -2:].clone()
        first, last = F.conv3d(edges, self.weight, self.bias, padding=(0, 0, 1)).chunk(2)
        y[:, :, :, :1], y[:, :, :, -1:] = first, last
        return y


class SplitDownsample(Downsample):
    """`Downsample` of the rows of a rank, which are an even number."""

    def forward(self, x: Tensor, z: None, cache: ConvCache) -> Tensor:
        assert isinstance(cache, SplitCache)
        if x.shape[3] == 0:
            return super().forward(_two_rows(x), z, cache)[:, :, :, :0]
        neighbours = cache.rows.exchange(x, down=False)
        y = super().forward(x, z, cache)
        _, below = neighbours()
        if cache.rows.below is not None:
            y[:, :, :, -1:] = super().forward(torch.cat([x[:, :, :, -2:], below], dim=3), z, cache)
        return y


class SplitUpsample(Upsample):
    """`Upsample` of the rows of a rank."""

    def forward(self, x: Tensor, z: Tensor, cache: ConvCache) -> Tensor:
        assert isinstance(cache, SplitCache)
        if x.shape[3] == 0:
            return super().forward(_two_rows(x), z, cache)[:, :, :, :0]
        neighbours = cache.rows.exchange(x)
        y = super().forward(x, z, cache)
        above, below = neighbours()
        # Of the 8 rows that these 4 become, the third sees the first two alone, and the sixth the last two.
        edges = super().forward(torch.cat([above, x[:, :, :, :1], x[:, :, :, -1:], below], dim=3), z, cache)
        y[:, :, :, :1], y[:, :, :, -1:] = edges[:, :, :, 2:3], edges[:, :, :, 5:6]
        return y


_SPLIT: dict[type[nn.Module], type[nn.Module]] = {
    VAE: SplitVAE,
    CausalConv3d: SplitCausalConv3d,
    Downsample: SplitDownsample,
    Upsample: SplitUpsample,
}


class _ForwardOnly(torch.autograd.Function):
    """Its first argument, which depends on the others."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Tensor) -> Tensor:  # noqa: ARG004
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError("vae: got a backward pass on several devices, want forward only; train on one")


def _over_rows(ops: Ops, mesh: Mesh) -> Ops:
    """Return operations whose norms take their statistics over the rows of all ranks."""
    channel_statistics, norm_silu = _halves(ops, mesh)

    def statistics(x: Tensor) -> Tensor:
        mine = torch.zeros(3, *x.shape[:2], dtype=torch.float64, device=x.device)
        if x.numel():
            mine[:2], mine[2] = channel_statistics(x), x[0, 0].numel()
        every = [torch.empty_like(mine) for _ in range(mesh.size)]
        dist.all_gather(every, mine, group=mesh.world)
        return merge_statistics(torch.stack(every))

    def norm(x: Tensor, *weights: Tensor, num_groups: int, eps: float) -> Tensor:
        found = statistics(x)  # on a rank without rows too
        return norm_silu(x, found, *weights, num_groups=num_groups, eps=eps) if x.numel() else x

    return dataclasses.replace(ops, group_norm_silu=norm, spatial_norm_silu=norm)


def _halves(ops: Ops, mesh: Mesh) -> tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]:
    """Return the functions `channel_statistics` and `norm_silu` that make up the norms of these operations."""
    norms = {ops.group_norm_silu, ops.spatial_norm_silu}
    if norms == {plain.group_norm_silu, plain.spatial_norm_silu}:
        return plain.channel_statistics, plain.norm_silu
    kernels = sys.modules.get("cogvid_kernels")  # imported, if the norms are its own
    if kernels is not None and norms == {kernels.group_norm_silu, kernels.spatial_norm_silu}:
        return kernels.channel_statistics, kernels.norm_silu
    raise ValueError(f"ops: got norms of your own on {mesh.size} devices, want those of 'torch' or 'triton'")


def merge_statistics(parts: Tensor) -> Tensor:
    """Return the statistics of all positions from those of parts: the formula of Chan, Golub and LeVeque.

    parts: `[N, 3, B, C]` fp64: mean, variance and number of positions. A part of none is fine. Returns `[2, B, C]`.
    """
    means, variances, counts = parts.unbind(1)
    shares = counts / counts.sum(0)
    mean = (shares * means).sum(0)
    return torch.stack([mean, (shares * (variances + (means - mean) ** 2)).sum(0)])


def _two_rows(x: Tensor) -> Tensor:
    """Return zeros like x, which has no rows, with two: for the shape of what a layer makes of it."""
    return x.new_zeros(*x.shape[:3], 2, x.shape[4])


def _check_same(name: str, x: Tensor, mesh: Mesh) -> None:
    """Raise on every rank if x has another shape on one of them."""
    # It is also what all ranks do first, as NCCL wants before some of them exchange rows.
    shapes = gather(torch.tensor([x.shape], device=x.device), 0, [1] * mesh.size, mesh.world).tolist()
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{name}: got shapes {shapes}, want the same on each rank")

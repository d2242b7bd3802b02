"""The block loop of a transformer on several processes: rows of the batch and pieces of the sequence.

Everything outside `Transformer.run_blocks` is done whole by each process: embeddings, the last norm and projection, the
sampler, guidance, step caches. `run_blocks` takes this process's part of the whole `[B, N, D]`, runs the blocks on it
and gathers the result, so what comes out is whole again, and the same bits on all processes. In a block everything but
attention is by token; `attention.py` has attention. `costs.bytes_of_gather` states what the gathering moves.
"""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from cogvid.models.transformer import Transformer
from cogvid.ops import BlockContext, Ops, Shard
from cogvid.parallel import costs
from cogvid.parallel.attention import SplitAttention
from cogvid.parallel.mesh import Mesh, gather


def split_transformer(transformer: Transformer, mesh: Mesh) -> None:
    """Let a transformer work with the others of a mesh, from now on; each process calls it on its own copy.

    With cfg=2, the two groups take halves of the rows: with both branches in one batch the unconditional half and the
    conditional half, otherwise the first half and the rest. A group without rows computes nothing. An attention must
    then compute each row by itself.

    Every process must call the transformer with the same inputs, and what a step cache or its `around_attention`
    decides must be the same on all. It cannot be trained: where gradients are on, an input that needs one is refused.

    Raises:
        ValueError: more processes for heads than heads; a ring with an attention that has no log-sum-exp; a transformer
            that was split before.
    """
    heads = transformer.config.num_attention_heads
    if mesh.split.ulysses > heads:
        raise ValueError(
            f"parallel: got ulysses={mesh.split.ulysses} for a model of {heads} heads, want at most {heads}"
        )
    if isinstance(transformer, _Split):
        raise ValueError(f"transformer: got one that is split by {transformer.mesh.split}, want one that is whole")
    attention = SplitAttention(transformer.ops.attention, mesh)  # before anything changes, because it may raise
    transformer.__class__ = _split_class(type(transformer))
    assert isinstance(transformer, _Split)
    transformer.mesh = mesh
    transformer.use(transformer.ops, attention)


class _Split(Transformer):
    """What a split transformer does otherwise. No instance is built: the class of one that exists changes."""

    mesh: Mesh
    _attention: SplitAttention

    def set_ops(self, ops: Ops) -> None:
        self.use(ops, SplitAttention(ops.attention, self.mesh))

    def use(self, ops: Ops, attention: SplitAttention) -> None:
        """Run these operations, but this attention, which wraps theirs."""
        super().set_ops(dataclasses.replace(ops, attention=attention))
        self._ops, self._attention = ops, attention

    def run_blocks(self, x: Tensor, context: BlockContext, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the blocks start..stop-1 on the whole `[B, N, D]`.

        Raises:
            ValueError: x is a part of a sequence, or it has fewer tokens than there are processes for them.
        """
        split, layers = self.mesh.split, range(len(self.blocks))[start:stop]
        batch, tokens = x.shape[:2]
        if context.shard != Shard(0, tokens, tokens):
            raise ValueError(f"shard: got {context.shard} of {tokens} tokens, want all, which the processes share")
        if tokens < split.ring * split.ulysses:
            raise ValueError(f"parallel: got {split} for {tokens} tokens, want ulysses * ring at most {tokens}")
        first, last = costs.pieces(batch, split.cfg)[self.mesh.index("cfg")]
        if first < last:
            out = self._run_rows(x[first:last], _rows(context, first, last, batch), layers)
        else:
            out = x[:0]
            if any(isinstance(block, FSDPModule) for block in self.blocks):
                # They collect their weights from all processes, so all must call them.
                alone = dataclasses.replace(_rows(context, 0, 1, batch), around_attention=BlockContext.around_attention)
                self._run_rows(x[:1], alone, layers)
        return gather(out, 0, costs.sizes(batch, split.cfg), self.mesh.group("cfg"))

    def _run_rows(self, x: Tensor, context: BlockContext, layers: range) -> Tensor:
        """Run the blocks with the other processes that have these rows; `[B, N, D]` in and out."""
        mesh, split = self.mesh, self.mesh.split
        found, groups = costs.pieces(x.shape[1], split.ring * split.ulysses), costs.ring_pieces(split, x.shape[1])
        begin, end = groups[mesh.index("ring")]
        start, stop = found[mesh.piece]
        piece, shared, x = context.part(start, stop), context.part(begin, end), x[:, start:stop]
        try:
            for layer in layers:
                self._attention.shared = shared.at(layer)
                x = super().run_blocks(x, piece, layer, layer + 1)
        finally:
            self._attention.shared = None
        neighbours = [stop - start for start, stop in found if begin <= start < end]
        x = gather(x, 1, neighbours, mesh.group("ulysses"))
        return gather(x, 1, [stop - start for start, stop in groups], mesh.group("ring"))


def _rows(context: BlockContext, first: int, last: int, batch: int) -> BlockContext:
    """Return the context of the rows `first` to `last - 1` of a batch."""
    if last - first == batch:
        return context
    branch = context.branch
    if branch == "both":
        branch = "cond" if first else "uncond"
    emb = None if context.emb is None else context.emb[first:last]
    return dataclasses.replace(context, temb=context.temb[first:last], emb=emb, branch=branch)


@functools.cache
def _split_class(kind: type[Transformer]) -> type[_Split]:
    return type(f"Split{kind.__name__}", (_Split, kind), {})

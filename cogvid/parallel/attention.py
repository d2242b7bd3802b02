"""Attention of tokens that several processes share: Ulysses, a ring, or both. It wraps any `AttentionOp`.

Each process has a piece of the tokens, with all heads. Ulysses exchanges tokens for heads: an all-to-all each for q, k
and v gives a process all tokens of its group, with a part of the heads, and one for the output goes back. The method is
that of DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509). Between groups, keys and values go around a ring, point to
point, and the partial results are merged by their log-sum-exp in fp32, as in ring attention
(https://arxiv.org/abs/2310.01889). Pieces of tokens and of heads may be of any size, but not empty.

What overlaps: q is under way while k is packed, and both while v is; attention waits for all three. The exchange of the
output overlaps with nothing. In the ring, the next keys and values are under way while attention of the present ones is
computed. The backend does it beside: NCCL in a stream of its own, gloo in threads, which need a core of their own.

Bytes: `costs.ulysses_bytes` and `costs.ring_bytes` state what a rank sends and receives in a block. In short, in
elements, with the letters of that file:

    Ulysses   sent 3 * B * n * (H - h) * hd + B * (m - n) * h * hd, m the tokens of the group; over the ranks of a group
              that is the sum of 4 * B * n * (H - h) * hd
    ring      sent 2 * B * (N - m') * h * hd, m' the tokens that the next rank began with
    both      the sum: the ring moves the heads that Ulysses gave to the rank
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.distributed import ProcessGroup

from cogvid import ops
from cogvid.ops import AttentionOp, BlockContext, Ops
from cogvid.parallel import costs
from cogvid.parallel.mesh import Mesh, check_no_gradients

# q, k, v, as those of an `AttentionOp` -> `[B, N, heads * hd]` and the log-sum-exp of the logits, `[B, heads, N]`; fp32
# for low precision
AttentionWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_LOGITS_AT_ONCE = 2**24  # of the attention that holds them in memory


class SplitAttention:
    """An `AttentionOp` for the tokens of one process, which asks the other processes for the rest.

    attention: what computes. It gets the tokens of this process's ring piece with some of the heads, and their context.

    Raises:
        ValueError: a ring, and an attention of which no log-sum-exp is known.
    """

    def __init__(self, attention: AttentionOp, mesh: Mesh) -> None:
        self._attention, self._mesh = attention, mesh
        self._with_lse = with_lse(attention) if mesh.split.ring > 1 else None
        # The context of the ring piece in the present block; None outside of `run_blocks`, where nothing is shared.
        self.shared: BlockContext | None = None
        self._key = next(_keys)
        _BY_KEY[self._key] = self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: BlockContext, /) -> Tensor:
        if self.shared is None:
            return self._attention(q, k, v, context)
        if torch.compiler.is_compiling():  # which cannot trace messages, but calls an operator as it is
            return _operator(q, k, v, self._key)
        return self.attend(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output of this process's tokens: from `[B, n, H, hd]` to `[B, n, H * hd]`, contiguous."""
        assert self.shared is not None
        for x in (q, k, v):
            check_no_gradients(x)
        mesh, split, total = self._mesh, self._mesh.split, self.shared.shard.total
        heads = costs.sizes(q.shape[2], split.ulysses)
        first = mesh.index("ring") * split.ulysses
        tokens = costs.sizes(total, split.ring * split.ulysses)[first : first + split.ulysses]
        if split.ulysses > 1:
            begun = [_begin_heads(x, tokens, heads, mesh.group("ulysses")) for x in (q, k, v)]
            q, k, v = (finish() for finish in begun)
        if self._with_lse is None:
            out = self._attention(q, k, v, self.shared)
        else:
            parts = [stop - start for start, stop in costs.ring_pieces(split, total)]
            out = _ring(self._with_lse, q, k, v, parts, mesh.group("ring"))
        return _to_tokens(out, tokens, heads, mesh.group("ulysses")) if split.ulysses > 1 else out


def _begin_heads(x: Tensor, tokens: list[int], heads: list[int], group: ProcessGroup) -> Callable[[], Tensor]:
    """Begin to send `[B, n, H, hd]`, to each process its heads; what is returned waits and has `[B, m, h, hd]`.

    tokens, heads: of each process of the group. Messages have the tokens first, so that the messages of all processes
    make one tensor as they arrive.
    """
    x = x.transpose(0, 1)  # [n, B, H, hd]
    sent = torch.cat([part.flatten() for part in x.split(heads, dim=2)])
    received = x.new_empty(sum(tokens), x.shape[1], heads[dist.get_rank(group)], x.shape[3])
    token, head = received[:1].numel(), x[:, :, :1].numel()
    inputs, outputs = [head * h for h in heads], [token * n for n in tokens]
    work = dist.all_to_all_single(received.view(-1), sent, outputs, inputs, group=group, async_op=True)

    def finish() -> Tensor:
        assert work is not None
        work.wait()
        return received.transpose(0, 1)

    return finish


def _to_tokens(out: Tensor, tokens: list[int], heads: list[int], group: ProcessGroup) -> Tensor:
    """Send `[B, m, h * hd]`, to each process its tokens; return `[B, n, H * hd]`, contiguous."""
    index, batch, width = dist.get_rank(group), out.shape[0], out.shape[2]
    sent = out.transpose(0, 1).contiguous().view(-1)  # [m, B, h * hd]
    inputs = [batch * width * n for n in tokens]
    outputs = [batch * width // heads[index] * h * tokens[index] for h in heads]
    received = sent.new_empty(sum(outputs))
    dist.all_to_all_single(received, sent, outputs, inputs, group=group)
    parts = [part.view(tokens[index], batch, -1).transpose(0, 1) for part in received.split(outputs)]
    return torch.cat(parts, dim=2)


def _ring(
    attention: AttentionWithLse, q: Tensor, k: Tensor, v: Tensor, sizes: list[int], group: ProcessGroup
) -> Tensor:
    """Attend from `[B, m, h, hd]` to the keys and values of all processes of the group, which have `sizes` of them."""
    count, index = len(sizes), dist.get_rank(group)
    wide = torch.promote_types(q.dtype, torch.float32)
    held = torch.stack([k, v])  # in one message
    out, total = q.new_zeros(q.shape, dtype=wide), q.new_full((), -torch.inf, dtype=wide)
    for step in range(count):
        coming, works = held, []
        if step < count - 1:
            coming = held.new_empty(2, k.shape[0], sizes[(index - step - 1) % count], *k.shape[2:])
            there, back = (index + 1) % count, (index - 1) % count
            messages = [
                dist.P2POp(dist.isend, held, group=group, group_peer=there),
                dist.P2POp(dist.irecv, coming, group=group, group_peer=back),
            ]
            works = dist.batch_isend_irecv(messages)
        part, lse = attention(q, held[0], held[1])
        lse = lse.transpose(1, 2)[..., None]  # [B, m, h, 1]
        summed = torch.logaddexp(total, lse)
        out = out * (total - summed).exp() + part.unflatten(2, q.shape[2:]) * (lse - summed).exp()
        total = summed
        for work in works:
            work.wait()
        held = coming
    return out.to(q.dtype).flatten(2)


def with_lse(attention: AttentionOp) -> AttentionWithLse:
    """Return the form of an attention that also returns its log-sum-exp.

    Raises:
        ValueError: there is none: it is neither PyTorch's nor the kernel's.
    """
    if attention is ops.attention:
        return torch_attention
    kernels: Any = sys.modules.get("cogvid_kernels")
    if kernels is not None and attention is Ops.triton().attention:
        return functools.partial(kernels.attention, return_lse=True)
    name = getattr(attention, "__qualname__", type(attention).__qualname__)
    raise ValueError(
        f"parallel: got ring above 1 with the attention {name:.60}, which has no log-sum-exp, want ulysses"
    )


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `AttentionWithLse` with what `scaled_dot_product_attention` would take, of what tells its log-sum-exp.

    On CUDA, FlashAttention or the memory-efficient kernel (cuDNN's is not asked), and elsewhere PyTorch's for CPUs.
    What these do not take is computed with its logits in memory, a few queries at a time.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2).flatten(2), lse
    if q.device.type == "cuda":
        params = SDPAParams(q, k, v, None, 0.0, False, False)
        if q.shape[-1] % 8 == 0 and can_use_flash_attention(params):
            out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
            return out.transpose(1, 2).flatten(2), lse
        if can_use_efficient_attention(params):
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
            return out.transpose(1, 2).flatten(2), lse[..., : q.shape[2]]  # it is padded
    return _attention_in_memory(q, k, v)


def _attention_in_memory(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `AttentionWithLse` of heads first, `[B, heads, N, hd]`, from its formula."""
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, all_lse, (k, v) = [], [], (k.to(wide), v.to(wide))
    for part in q.split(max(_LOGITS_AT_ONCE // k[..., 0].numel(), 1), dim=2):
        logits = part.to(wide) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        lse = logits.logsumexp(-1)
        outs.append(((logits - lse[..., None]).exp_() @ v).to(q.dtype))
        all_lse.append(lse)
    return torch.cat(outs, dim=2).transpose(1, 2).flatten(2), torch.cat(all_lse, dim=2)


# An operator takes tensors and numbers, so it finds its `SplitAttention` by a number.
_keys = itertools.count()
_BY_KEY: weakref.WeakValueDictionary[int, SplitAttention] = weakref.WeakValueDictionary()


@torch.library.custom_op(
    "cogvid::split_attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, int key) -> Tensor"
)
def _operator(q: Tensor, k: Tensor, v: Tensor, key: int) -> Tensor:
    return _BY_KEY[key].attend(q, k, v)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key: int) -> Tensor:  # noqa: ARG001
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])

"""Attention that tells its log-sum-exp, and the kernels on several processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cogvid import ops
from cogvid.ops import Ops
from cogvid.parallel import attention as module
from cogvid.parallel.attention import torch_attention, with_lse
from cogvid.weights.parallel_option import Parallel
from measure import rel_rms
from tests.distributed.models import KINDS, inputs, split_tiny, tiny
from tests.distributed.ranks import Ranks
from tests.tolerances import ATTENTION_FP32, SPLIT_FP32

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v.double()).flatten(2), logits.logsumexp(-1)


@pytest.mark.parametrize("in_memory", [False, True], ids=["torch's", "in memory"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(33, 70, 64), (1, 1, 8), (50, 3, 10)])
def test_attention_with_its_log_sum_exp(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strided as views of a linear's output are; the form in memory in parts of a few queries."""
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 1000)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, 3, head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, keys, 2, 3, head_dim, generator=generator).to(dtype).unbind(2)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = module._attention_in_memory(*heads_first) if in_memory else torch_attention(q, k, v)
    expected, expected_lse = exact(q, k, v)
    assert (out.shape, out.dtype) == ((2, queries, 3 * head_dim), dtype)
    assert (lse.shape, lse.dtype) == ((2, 3, queries), torch.promote_types(dtype, torch.float32))
    assert rel_rms(out, expected) < (1e-2 if dtype == torch.bfloat16 else ATTENTION_FP32)
    # In low precision it has the errors of another exp, which must stay far below the 2**-9 of rounding a weight.
    assert rel_rms(lse, expected_lse) < (2**-13 if dtype == torch.bfloat16 else ATTENTION_FP32)


def test_huge_logits_do_not_overflow() -> None:
    q, k = torch.full((1, 1, 1, 8), 100.0), torch.ones(1, 2, 1, 8)
    k[:, 1] = -1
    for _, lse in (torch_attention(q, k, k), module._attention_in_memory(*(x.transpose(1, 2) for x in (q, k, k)))):
        assert lse.item() == pytest.approx(800 / math.sqrt(8))


def test_which_attention_tells_its_log_sum_exp() -> None:
    assert with_lse(Ops.torch().attention) is torch_attention
    triton = pytest.importorskip("triton", reason="the kernels need it")
    assert triton
    assert with_lse(Ops.triton().attention).func is not None  # pyright: ignore
    for custom in (lambda *_: torch.zeros(1), ops.rotate, object()):
        with pytest.raises(ValueError, match=r"^parallel: got a ring and the attention .*, want ulysses alone$"):
            with_lse(custom)  # pyright: ignore


@pytest.mark.slow  # the interpreter
def test_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, chosen before triton is imported; with pieces that have no text and text alone."""
    pytest.importorskip("triton", reason="the kernels need it")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = KINDS["5B"]
    with Ranks(3) as three:
        for split in (Parallel(ulysses=3), Parallel(ring=3)):
            for text_len in (3, 9):  # of 15 and 21 tokens: the first piece has 5 and 7
                found = three.run(kernels, split, text_len)
                expected = tiny(config)(*inputs(config, size=(1, 4, 12), text_len=text_len))
                assert all(torch.equal(each, found[0]) for each in found)
                assert rel_rms(found[0], expected) < SPLIT_FP32


def kernels(split: Parallel, text_len: int) -> Tensor:
    model = split_tiny(KINDS["5B"], split)
    model.set_ops(Ops.triton())
    return model(*inputs(KINDS["5B"], size=(1, 4, 12), text_len=text_len), branch="both")

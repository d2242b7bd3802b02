"""What a block is told, as attention and step caches see it; and operations that are changed at run time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cogvid
from cogvid.ops import BlockContext, Ops, Shard, attention
from measure import rel_rms
from references import picture
from tests.tolerances import UNFUSED_FP32
from tests.unit.test_modules_called import CONFIGS, inputs, make

QUICK: dict[str, Any] = {
    "num_inference_steps": 2,
    "num_frames": 9,
    "seed": 1,
    "output_type": "latent",
    "progress": False,
}


def test_attention_is_told_where_it_runs() -> None:
    told: list[BlockContext] = []

    def listening(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        told.append(context)
        assert q.shape[1] == context.shard.total
        return attention(q, k, v)

    pipe = cogvid.load("tiny-t2v", device="cpu", ops=dataclasses.replace(Ops.torch(), attention=listening))
    layers = len(pipe.transformer.blocks)
    for scale, branch in ((2.0, "both"), (1.0, "cond")):
        told.clear()
        pipe("the red circle moves right", guidance_scale=scale, **QUICK)
        assert [(c.step, c.layer) for c in told] == [(step, layer) for step in range(2) for layer in range(layers)]
        assert {c.branch for c in told} == {branch}
        assert {(c.text_len, c.grid) for c in told} == {(16, (3, 4, 4))}
        assert {c.shard for c in told} == {Shard(0, 16 + 3 * 4 * 4, 16 + 3 * 4 * 4)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cut", [3, 8, 20], ids=["in the text", "at the border", "in the video"])
def test_a_part_of_the_sequence_runs_by_itself(name: str, cut: int) -> None:
    """Each half attends from its own tokens to the keys of all, as devices do that share a sequence."""
    config = CONFIGS[name]
    keys: dict[int, tuple[Tensor, Tensor]] = {}

    def keeping(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        keys[context.layer] = k, v
        return attention(q, k, v)

    def to_all(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        held, (all_k, all_v) = context.shard, keys[context.layer]
        assert rel_rms(k, all_k[:, held.start : held.stop]) < UNFUSED_FP32
        assert v.shape == all_v[:, held.start : held.stop].shape
        q, k, v = (x.transpose(1, 2) for x in (q, all_k, all_v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    class Halves:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {}

        def run(self, x: Tensor, context: BlockContext, blocks: Any) -> Tensor:
            model.set_ops(dataclasses.replace(Ops.torch(), attention=keeping))
            self.state["whole"] = blocks(x)
            model.set_ops(dataclasses.replace(Ops.torch(), attention=to_all))
            parts = ((0, cut), (cut, x.shape[1]))
            return torch.cat([model.run_blocks(x[:, a:b], context.part(a, b)) for a, b in parts], dim=1)

    model, args = make(config), inputs(config)
    expected = model(*args)
    assert rel_rms(model(*args, step_cache=Halves()), expected) < UNFUSED_FP32


def test_parts_of_parts_know_their_place() -> None:
    rope = torch.arange(10.0)[:, None], torch.arange(10.0)[:, None]
    whole = BlockContext(torch.zeros(1, 1), rope, text_len=4, grid=(1, 2, 5), shard=Shard(0, 14, 14))
    inner = whole.part(2, 12).part(3, 9)
    assert inner.shard == Shard(5, 11, 14)
    assert inner.text_len == 0
    assert inner.rope is not None
    assert inner.rope[0][:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    text = whole.part(0, 3)
    assert (text.text_len, text.shard) == (3, Shard(0, 3, 14))
    assert text.rope is not None
    assert len(text.rope[0]) == 0


def test_ops_are_set_at_run_time() -> None:
    calls: list[str] = []

    def noting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(Ops.torch(), name)(*args, **kwargs)

        return call

    names = [field.name for field in dataclasses.fields(Ops)]
    pipe = cogvid.load("tiny-i2v", device="cpu")
    options = {**QUICK, "output_type": "uint8", "image": picture(64, 64)}
    before = pipe("the red circle moves right", **options)
    pipe.set_ops(Ops(**{name: noting(name) for name in names}))
    after = pipe("the red circle moves right", **options)
    assert set(calls) == set(names)
    assert torch.equal(before.frames, after.frames)
    assert (before.provenance["ops"], after.provenance["ops"]) == ("torch", "custom")
    calls.clear()
    pipe.set_ops("torch")
    assert pipe("the red circle moves right", **options).provenance["ops"] == "torch"
    assert not calls


def test_ops_cannot_be_assigned_without_effect() -> None:
    pipe = cogvid.load("tiny-t2v", device="cpu")
    for part in (pipe, pipe.transformer, pipe.vae):
        with pytest.raises(AttributeError):
            part.ops = Ops.torch()  # pyright: ignore
    with pytest.raises(ValueError, match=r"^ops: got 'cuda', want 'auto', 'torch', 'triton' or an Ops$"):
        pipe.set_ops("cuda")

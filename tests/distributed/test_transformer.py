"""A transformer on several processes against one process: every kind, split and shape, caches, adapters, bytes."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cogvid
from cogvid.config import TransformerConfig
from cogvid.models.cut_positions import CutPositions
from cogvid.models.quantize import quantized
from cogvid.ops import BlockContext, Ops
from cogvid.ops import attention as torch_attention
from cogvid.weights.lora import Loras
from cogvid.weights.lora_file import Adapter, Update
from cogvid.weights.lora_option import Lora
from cogvid.weights.parallel_option import Parallel
from measure import pooled_ratio, rel_rms
from tests.distributed.models import KINDS, inputs, split_tiny, tiny
from tests.distributed.ranks import Ranks
from tests.tolerances import SPLIT_BF16, SPLIT_FP32

P = Parallel
AllRanks = Callable[[int], Ranks]


def forward(kind: str, split: Parallel, options: dict[str, Any], branch: str) -> Tensor:
    config = KINDS[kind]
    return split_tiny(config, split)(*inputs(config, **options), branch=branch, step=0)


def compare(ranks: AllRanks, kind: str, split: Parallel, branch: str = "both", **options: Any) -> None:
    found = ranks(split.devices).run(forward, kind, split, options, branch)
    assert all(torch.equal(each, found[0]) for each in found)
    assert rel_rms(found[0], tiny(KINDS[kind])(*inputs(KINDS[kind], **options))) < SPLIT_FP32


@pytest.mark.parametrize("split", [P(cfg=2), P(ulysses=2), P(ring=2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(ranks: AllRanks, kind: str, split: Parallel) -> None:
    compare(ranks, kind, split)


@pytest.mark.parametrize("split", [P(ulysses=3), P(ring=3)], ids=str)
@pytest.mark.parametrize("kind", ["5B", "1.5"])
def test_three_processes(ranks: AllRanks, kind: str, split: Parallel) -> None:
    """104 or 56 tokens in three pieces; 5 heads in three parts. The text of 8 tokens is in the first piece alone."""
    if kind == "1.5" or split.ring > 1:
        compare(ranks, kind, split)
    else:
        compare(ranks, kind, split, size=(3, 6, 10), text_len=5)  # 50 tokens


# Shapes: batch, latent frames, height and width, text tokens, and the branch.
SHAPES: dict[str, dict[str, Any]] = {
    "portrait": {"size": (3, 14, 6)},
    "one frame": {"size": (1, 8, 12)},
    "guidance off": {"batch": 1, "branch": "cond"},
    "batch 3, guidance off": {"batch": 3, "branch": "cond"},
    "batch 3": {"batch": 6},
    "odd": {"size": (3, 6, 10), "text_len": 7},
    "text alone in a piece": {"size": (1, 2, 4), "text_len": 9},
    "one token for each": {"size": (1, 4, 4), "text_len": 2},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(ranks: AllRanks, name: str) -> None:
    for split in (P(cfg=2), P(ulysses=2), P(ring=2)):
        compare(ranks, "5B", split, **SHAPES[name])


MANY = [
    P(cfg=2, ulysses=2), P(cfg=2, ring=2), P(ulysses=2, ring=2), P(ulysses=4), P(ring=4),
    P(cfg=2, ulysses=3), P(cfg=2, ring=3), P(ulysses=2, ring=3), P(ulysses=3, ring=2), P(ulysses=6), P(ring=6),
]  # fmt: skip


@pytest.mark.slow  # 4 and 6 processes
@pytest.mark.parametrize("split", MANY, ids=str)
def test_four_and_six_processes(ranks: AllRanks, split: Parallel) -> None:
    for kind, config in KINDS.items():
        if split.ulysses <= config.num_attention_heads:
            compare(ranks, kind, split)
    for name, shape in SHAPES.items():
        if name != "one token for each" or split.ulysses * split.ring <= 6:
            compare(ranks, "5B", split, **shape)


@pytest.mark.slow  # models of official width
@pytest.mark.parametrize(
    ("kind", "split"),
    [("cogvideox-5b", P(ulysses=4)), ("cogvideox-5b", P(cfg=2, ring=2)), ("cogvideox-2b", P(ulysses=2, ring=2))],
    ids=str,
)
def test_one_layer_of_real_width(ranks: AllRanks, kind: str, split: Parallel) -> None:
    found = ranks(split.devices).run(wide_forward, kind, split)
    assert all(torch.equal(each, found[0]) for each in found)
    assert rel_rms(found[0], wide_forward(kind, None)) < SPLIT_FP32


def wide_forward(kind: str, split: Parallel | None) -> Tensor:
    config = dataclasses.replace(cogvid.CONFIGS[kind].transformer, num_layers=1, text_embed_dim=64)
    model = tiny(config) if split is None else split_tiny(config, split)
    with torch.no_grad():
        return model(*inputs(config, size=(3, 10, 14)), branch="both")


@pytest.mark.slow  # many shapes
def test_random_splits_and_shapes(ranks: AllRanks) -> None:
    draw = random.Random(0)
    for _ in range(60):
        kind = draw.choice(list(KINDS))
        config = dataclasses.replace(
            KINDS[kind], num_attention_heads=draw.randint(1, 7), attention_head_dim=16, num_layers=draw.randint(1, 3)
        )
        processes, cfg = draw.choice([(2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (6, 1), (6, 2)])
        share = processes // cfg
        ulysses = draw.choice([u for u in range(1, share + 1) if share % u == 0 and u <= config.num_attention_heads])
        size = (2 * draw.randint(1, 2), 2 * draw.randint(1, 5), 2 * draw.randint(2, 5))
        options: dict[str, Any] = {"batch": draw.randint(1, 4), "size": size, "text_len": draw.randint(1, 12)}
        if config.use_learned_positional_embeddings:
            options["size"] = (4, 8, 12)
        if config.adds_positions:
            options["text_len"] = None
        branch = "cond" if options["batch"] % 2 else draw.choice(["both", "uncond"])
        split = P(cfg, ulysses, share // ulysses)
        found = ranks(processes).run(drawn_forward, config, split, options, branch)
        about = f"{config}, {split}, {options}, {branch}"
        assert all(torch.equal(each, found[0]) for each in found), about
        assert rel_rms(found[0], tiny(config)(*inputs(config, **options))) < SPLIT_FP32, about


def drawn_forward(config: TransformerConfig, split: Parallel, options: dict[str, Any], branch: Any) -> Tensor:
    return split_tiny(config, split)(*inputs(config, **options), branch=branch)


def test_low_precision_is_as_close_to_fp32_as_on_one_process(ranks: AllRanks) -> None:
    errors = []
    for kind in KINDS:
        exact, alone = tiny(KINDS[kind])(*inputs(KINDS[kind])), low_precision(kind, None)
        for split in (P(ulysses=2), P(ring=2)):
            found = ranks(2).run(low_precision, kind, split)
            assert torch.equal(*found)
            assert found[0].dtype == torch.bfloat16
            errors.append((rel_rms(found[0], exact), rel_rms(alone, exact)))
    assert pooled_ratio(errors) < SPLIT_BF16


def low_precision(kind: str, split: Parallel | None) -> Tensor:
    config = KINDS[kind]
    model = (tiny(config) if split is None else split_tiny(config, split)).bfloat16()
    latents, text, timestep = inputs(config)
    return model(latents.bfloat16(), text.bfloat16(), timestep, branch="both")


# What a split transformer keeps: its operations, modules that others changed, and its class.


def test_operations_stay_the_users(ranks: AllRanks) -> None:
    for told in ranks(2).run(operations):
        assert told["ops"]
        assert told["shards"] == {(0, 104, 8)}, "attention sees all tokens of the group"
        assert told["layers"] == [0, 1]
        assert told["heads"] == {3}
        assert told["whole"] == {6}, "a block that is called by itself is whole"


def operations() -> dict[str, Any]:
    seen: list[tuple[BlockContext, int]] = []

    def listening(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        seen.append((context, q.shape[2]))
        assert q.shape[1] == context.shard.stop - context.shard.start
        assert context.rope is not None
        assert len(context.rope[0]) == q.shape[1] - context.text_len
        return torch_attention(q, k, v)

    config = KINDS["5B"]
    model, args = split_tiny(config, P(ulysses=2)), inputs(config)
    expected = model(*args)
    custom = dataclasses.replace(Ops.torch(), attention=listening)
    model.set_ops(custom)
    assert torch.equal(model(*args), expected)
    told = {
        "ops": model.ops is custom,
        "shards": {(c.shard.start, c.shard.stop, c.text_len) for c, _ in seen},
        "layers": [c.layer for c, _ in seen],
        "heads": {heads for _, heads in seen},
    }
    context = dataclasses.replace(seen[0][0], temb=torch.zeros(2, config.time_embed_dim))
    seen.clear()
    model.blocks[0](torch.randn(2, 104, config.hidden_size), context)
    return told | {"whole": {heads for _, heads in seen}}


def test_sat_positions_stay(ranks: AllRanks) -> None:
    size = (3, 6, 10)
    expected = tiny(KINDS["5B"], kind=CutPositions)(*inputs(KINDS["5B"], size=size))
    assert rel_rms(tiny(KINDS["5B"])(*inputs(KINDS["5B"], size=size)), expected) > 1e-3
    for found in ranks(2).run(cut_positions, size):
        assert rel_rms(found, expected) < SPLIT_FP32


def cut_positions(size: tuple[int, int, int]) -> Tensor:
    model = split_tiny(KINDS["5B"], P(ring=2), kind=CutPositions)
    assert isinstance(model, CutPositions)
    return model(*inputs(KINDS["5B"], size=size))


@pytest.mark.parametrize("how", ["lora", "int8", "fp8-storage", "hook", "triton"])
def test_what_changes_modules_or_operations(ranks: AllRanks, how: str) -> None:
    """Adapters, quantised linears, hooks and the kernels, in the interpreter, give what they give on one process."""
    if how == "triton":
        pytest.importorskip("triton", reason="the kernels need it")
    if how == "int8":
        pytest.importorskip("torchao", reason="int8 weights need it")
    if how == "triton":  # only processes of their own can have the kernels interpreted
        expected = tiny(KINDS["5B"])(*inputs(KINDS["5B"], size=_SMALL))
    else:
        expected = changed(how, None)
        assert rel_rms(tiny(KINDS["5B"])(*inputs(KINDS["5B"])), expected) > 1e-3
    for split in (P(cfg=2), P(ulysses=2), P(ring=2)):
        found = ranks(2).run(changed, how, split)
        assert torch.equal(*found)
        assert rel_rms(found[0], expected) < SPLIT_FP32


_SMALL = (1, 4, 6)


def changed(how: str, split: Parallel | None) -> Tensor:
    config = KINDS["5B"]
    model = tiny(config) if split is None else split_tiny(config, split)
    if how == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
        model.set_ops(Ops.triton())
        return model(*inputs(config, size=_SMALL), branch="both")
    generator = torch.Generator().manual_seed(3)
    updates = {}
    for name in [f"blocks.{layer}.{linear}" for layer in range(2) for linear in ("q_proj", "out", "mlp_in")]:
        linear: Any = model.get_submodule(name)
        down, up = (torch.randn(shape, generator=generator) for shape in ((4, 96), (linear.out_features, 4)))
        updates[name] = Update(down, up, 0.05)
        if how == "hook":
            linear.register_forward_hook(lambda _m, _x, y: 0.5 * y)
        elif how != "lora":
            model.set_submodule(name, quantized(linear, how, name))
    if how == "lora":
        Loras(model).add([Adapter(Lora("a.safetensors", 1.0, "a"), updates)])
    return model(*inputs(config), branch="both")

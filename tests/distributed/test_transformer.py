"""A transformer on several processes against one process: every kind, split and shape, caches, adapters, bytes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cogvid
from cogvid.config import TransformerConfig
from cogvid.models.cut_positions import CutPositions
from cogvid.models.quantize import quantized
from cogvid.models.transformer import Transformer
from cogvid.ops import BlockContext, Ops, Shard
from cogvid.ops import attention as torch_attention
from cogvid.parallel.cache_state import gather_state, scatter_state
from cogvid.parallel.costs import Traffic, bytes_of_block, bytes_of_gather
from cogvid.parallel.transformer import split_transformer
from cogvid.run.capture import capture_attention
from cogvid.run.compiled import compile_modules
from cogvid.sampling.cache import make_step_cache
from cogvid.sampling.schedule import make_schedule
from cogvid.weights.lora import Loras
from cogvid.weights.lora_file import Adapter, Update
from cogvid.weights.lora_option import Lora
from cogvid.weights.parallel_option import Parallel
from measure import pooled_ratio, rel_rms
from tests.distributed.models import KINDS, inputs, mesh_of, split_tiny, tiny
from tests.distributed.ranks import Ranks
from tests.tolerances import COMPILED_RMS_FP32, SPLIT_BF16, SPLIT_CACHE_FP32, SPLIT_FP32

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


def test_each_group_is_told_its_branch_and_rows(ranks: AllRanks) -> None:
    """Of six rows with both branches, three each; of three rows of one branch, two and one."""
    assert ranks(2).run(branches, 6, "both") == [("uncond", 0, 3), ("cond", 3, 6)]
    assert ranks(2).run(branches, 3, "cond") == [("cond", 0, 2), ("cond", 2, 3)]


def branches(batch: int, branch: Any) -> tuple[str, int, int]:
    """Return the branch, and which rows of the timestep's embedding came with it."""
    seen: list[BlockContext] = []

    def listening(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        seen.append(context)
        return torch_attention(q, k, v)

    custom = dataclasses.replace(Ops.torch(), attention=listening)
    tiny(KINDS["5B"], ops=custom)(*inputs(KINDS["5B"], batch=batch), branch=branch)
    split_tiny(KINDS["5B"], P(cfg=2), ops=custom)(*inputs(KINDS["5B"], batch=batch), branch=branch)
    whole, part = seen[0], seen[-1]
    assert whole.emb is not None
    assert part.emb is not None
    first = next(i for i in range(batch) if torch.equal(whole.temb[i], part.temb[0]))
    assert torch.equal(part.temb, whole.temb[first : first + len(part.temb)])
    assert torch.equal(part.emb, whole.emb[first : first + len(part.temb)])
    return part.branch, first, first + len(part.temb)


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


@pytest.mark.parametrize("how", ["lora", pytest.param("int8", marks=pytest.mark.slow), "fp8-storage", "hook"])
def test_what_changes_modules(ranks: AllRanks, how: str) -> None:
    """Adapters, quantised linears and hooks give what they give on one process."""
    if how == "int8":
        pytest.importorskip("torchao", reason="int8 weights need it")
    expected = changed(how, None)
    assert rel_rms(tiny(KINDS["5B"])(*inputs(KINDS["5B"])), expected) > 1e-3
    for split in (P(cfg=2), P(ulysses=2), P(ring=2)):
        found = ranks(2).run(changed, how, split)
        assert torch.equal(*found)
        assert rel_rms(found[0], expected) < SPLIT_FP32


def changed(how: str, split: Parallel | None) -> Tensor:
    config = KINDS["5B"]
    model = tiny(config) if split is None else split_tiny(config, split)
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


# Bytes: what goes through torch.distributed, counted, against the formulas of costs.py.


@pytest.mark.parametrize(
    ("split", "batch"),
    [(P(cfg=2), 2), (P(cfg=2), 1), (P(ulysses=2), 2), (P(ring=2), 3), (P(ulysses=3), 1), (P(ring=3), 2)],
    ids=str,
)
def test_no_more_bytes_than_the_formula(ranks: AllRanks, split: Parallel, batch: int) -> None:
    count_bytes(ranks, split, batch)


@pytest.mark.slow  # 4 and 6 processes
@pytest.mark.parametrize("split", MANY, ids=str)
def test_no_more_bytes_than_the_formula_on_many(ranks: AllRanks, split: Parallel) -> None:
    for batch in (1, 2, 3):
        count_bytes(ranks, split, batch)


def count_bytes(ranks: AllRanks, split: Parallel, batch: int) -> None:
    """53 tokens and 7 heads of 16 channels, so that all pieces are uneven; 2 bytes an element and 2 blocks."""
    found = ranks(split.devices).run(counted, split, batch)
    for rank, traffic in enumerate(found):
        block = bytes_of_block(split, rank, batch, 53, 7, 16, 2)
        assert traffic == block.plus(block).plus(bytes_of_gather(split, rank, batch, 53, 7 * 16, 2))


def counted(split: Parallel, batch: int) -> Traffic:
    config = dataclasses.replace(KINDS["5B"], num_attention_heads=7)
    model = split_tiny(config, split).bfloat16()
    latents, text, timestep = inputs(config, batch=batch, size=(3, 6, 10), text_len=8)
    sent = received = 0

    def count_all_to_all(out: Tensor, x: Tensor, outs: list[int], ins: list[int], **options: Any) -> Any:
        nonlocal sent, received
        own = dist.get_rank(options["group"])
        sent += (len(x) - ins[own]) * x[:1].nbytes
        received += (len(out) - outs[own]) * out[:1].nbytes
        assert sum(ins) == len(x)
        return all_to_all(out, x, outs, ins, **options)

    def count_messages(messages: list[Any]) -> Any:
        nonlocal sent, received
        sent += sum(each.tensor.nbytes for each in messages if each.op is dist.isend)
        received += sum(each.tensor.nbytes for each in messages if each.op is dist.irecv)
        return batch_isend_irecv(messages)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective that is not counted")

    all_to_all, batch_isend_irecv = dist.all_to_all_single, dist.batch_isend_irecv
    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(patch.object(dist, name, forbidden))
        stack.enter_context(patch.object(dist, "all_to_all_single", count_all_to_all))
        stack.enter_context(patch.object(dist, "batch_isend_irecv", count_messages))
        model(latents.bfloat16(), text.bfloat16(), timestep, branch="both" if batch % 2 == 0 else "cond")
    return Traffic(sent, received)


COLLECTIVES = [
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "broadcast", "broadcast_object_list", "gather", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter", "send",
]  # fmt: skip


# Step caches: what they decide, and their state on another number of processes.

CACHES = ("first-block=0.6", "teacache=0.9:coefficients=1/0", "pyramid=2")


@pytest.mark.parametrize(
    ("split", "guided"),
    [
        (P(cfg=2), True),
        (P(cfg=2), False),
        (P(ulysses=2), True),
        *(pytest.param(split, False, marks=pytest.mark.slow) for split in (P(ring=3), P(cfg=2, ulysses=2))),
    ],
    ids=str,
)
@pytest.mark.parametrize("named", CACHES)
def test_step_caches(ranks: AllRanks, named: str, split: Parallel, guided: bool) -> None:
    """The same steps are skipped as on one process; a state from it or for it is that of one process."""
    expected, skipped, _ = denoise(None, named, guided, 0, 8)
    assert skipped
    found = ranks(split.devices).run(denoise, split, named, guided, 0, 8)
    assert all(torch.equal(x, found[0][0]) for x, _, _ in found)
    assert [each for _, each, _ in found] == [skipped] * split.devices
    assert rel_rms(found[0][0], expected) < SPLIT_CACHE_FP32

    halfway, _, alone = denoise(None, named, guided, 0, 5)
    found = ranks(split.devices).run(denoise, split, named, guided, 0, 5)
    state = found[0][2]
    assert [each for _, _, each in found[1:]] == [None] * (split.devices - 1)
    assert_same(state, alone)
    assert rel_rms(denoise(None, named, guided, 5, 8, found[0][0], state)[0], expected) < SPLIT_CACHE_FP32
    found = ranks(2).run(denoise, P(ulysses=2), named, guided, 5, 8, halfway, alone)
    assert rel_rms(found[0][0], expected) < SPLIT_CACHE_FP32
    assert found[1][1] == skipped


def assert_same(state: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(state) == list(expected)
        for key in expected:
            assert_same(state[key], expected[key])
    elif isinstance(expected, Tensor):
        assert state.shape == expected.shape
        assert state.is_contiguous()
        assert rel_rms(state, expected) < SPLIT_CACHE_FP32
    else:
        assert state == pytest.approx(expected)


def denoise(
    split: Parallel | None, named: str, guided: bool, start: int, stop: int, begun: Any = None, state: Any = None
) -> tuple[Tensor, list[int], Any]:
    """Take some of 8 steps of a sampler that subtracts; return x, the steps skipped so far and the whole state."""
    config, model_config = KINDS["5B"], cogvid.CONFIGS["tiny-t2v"]
    model = tiny(config) if split is None else split_tiny(config, split)
    schedule = make_schedule(model_config.schedule, 8)
    cache: Any = make_step_cache(named, model_config, schedule)
    latents, text, _ = inputs(config)
    x: Tensor = latents[:1] if begun is None else begun
    if state is not None:
        cache.state = state if split is None else scatter_state(state, mesh_of(split))
    for step in range(start, stop):
        rows = 2 if guided else 1
        timestep = torch.full((rows,), float(schedule.timesteps[step]))
        branch = "both" if guided else "cond"
        v = model(x.expand(rows, -1, -1, -1, -1), text[-rows:], timestep, step=step, branch=branch, step_cache=cache)
        x = x - 0.02 * (v[:1] + 2 * (v[1:] - v[:1]) if guided else v)
    return x, cache.skipped, cache.state if split is None else gather_state(cache.state, mesh_of(split))


def test_a_state_that_cannot_be_put_together_is_refused(ranks: AllRanks) -> None:
    for error in ranks(2).run(broken_states):
        assert error == [
            "step_cache: got a state['kept'] that differs between processes, want the same on all, or a key 'held' for "
            "what around_attention keeps",
            "step_cache: got a state['held'][0] of [((1,), torch.float32), ((2,), torch.float32)], want tensors "
            "[rows, tokens, ...]",
        ]


def broken_states() -> list[str]:
    mesh, errors = mesh_of(P(ulysses=2)), []
    for state in ({"kept": torch.ones(2, 3 + mesh.rank)}, {"held": {0: torch.ones(1 + mesh.rank)}}):
        with pytest.raises(ValueError, match=r"^step_cache: ") as error:
            gather_state(state, mesh)
        errors.append(str(error.value))
    return errors


# What cannot be.


def test_what_cannot_be_is_refused_in_one_line(ranks: AllRanks) -> None:
    for errors in ranks(3).run(refusals):
        assert errors == [
            "parallel: got ulysses=3 for a model of 2 heads, want at most 2",
            "transformer: got one that is split by cfg=1,ulysses=3,ring=1, want one that is whole",
            "parallel: got cfg=1,ulysses=3,ring=1 for 2 tokens, want ulysses * ring at most 2",
            "shard: got Shard(start=1, stop=9, total=9) of 8 tokens, want all, which the processes share",
            "gradients: got a tensor that needs one on several processes, want torch.no_grad()",
            "parallel: got a ring and the attention refusals.<locals>.custom, which tells no log-sum-exp, want "
            "ulysses alone",
            "parallel: got a ring and the attention refusals.<locals>.custom, which tells no log-sum-exp, want "
            "ulysses alone",
        ]


def refusals() -> list[str]:
    errors: list[str] = []

    def refused(call: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match="want") as error:
            call()
        errors.append(str(error.value))

    def custom(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:  # noqa: ARG001
        return torch_attention(q, k, v)

    refused(lambda: split_tiny(KINDS["1.5-I2V"], P(ulysses=3)))
    config = KINDS["5B"]
    model = split_tiny(config, P(ulysses=3))
    refused(lambda: split_transformer(model, mesh_of(P(ulysses=3))))
    refused(lambda: model(*inputs(config, size=(1, 2, 2), text_len=1)))
    context = BlockContext(torch.zeros(1, 32), None, 0, (1, 1, 1), Shard(1, 9, 9))
    refused(lambda: model.run_blocks(torch.zeros(1, 8, config.hidden_size), context))
    model.requires_grad_(True)
    refused(lambda: model(*inputs(config)))
    with torch.no_grad():
        model(*inputs(config))
    ops = dataclasses.replace(Ops.torch(), attention=custom)
    whole = tiny(config, ops=ops)
    refused(lambda: split_transformer(whole, mesh_of(P(ring=3))))
    assert type(whole) is Transformer
    ring = split_tiny(config, P(ring=3))
    refused(lambda: ring.set_ops(ops))
    assert ring.ops is Ops.torch()
    return errors


@pytest.mark.slow  # compilations
@pytest.mark.parametrize(("split", "backend", "most"), [(P(ulysses=2), "eager", 2), (P(ring=2), "inductor", 3)])
def test_compiled_blocks(ranks: AllRanks, split: Parallel, backend: str, most: int) -> None:
    """Messages are an operator in the graph. There are no more graphs than on one process, for two sizes."""
    found = ranks(2).run(compiled, split, backend)
    assert torch.equal(found[0][0], found[1][0])
    assert rel_rms(found[0][0], tiny(KINDS["5B"])(*inputs(KINDS["5B"]))) < COMPILED_RMS_FP32
    assert max(graphs for _, graphs in found) <= most


def compiled(split: Parallel, backend: str) -> tuple[Tensor, int]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter: Any = CompileCounterWithBackend(backend)
    model = split_tiny(KINDS["5B"], split)
    compile_modules(model.blocks, counter)
    with torch.no_grad():
        out = model(*inputs(KINDS["5B"]), branch="both")
        model(*inputs(KINDS["5B"], batch=4, size=(3, 6, 10), text_len=5), branch="both")
    torch.compiler.reset()
    return out, counter.frame_count


@pytest.mark.slow  # FSDP
def test_a_group_without_rows_still_gathers_sharded_weights(ranks: AllRanks) -> None:
    expected = tiny(KINDS["5B"])(*inputs(KINDS["5B"], batch=1))
    for found in [*ranks(2).run(sharded, True), *ranks(2).run(sharded, False)]:
        assert rel_rms(found, expected) < SPLIT_FP32


def sharded(before: bool) -> Tensor:
    model, everyone = tiny(KINDS["5B"]), init_device_mesh("cpu", (2,))
    if before:
        split_transformer(model, mesh_of(P(cfg=2)))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=everyone)
    if not before:
        split_transformer(model, mesh_of(P(cfg=2)))
    with torch.no_grad():
        return model(*inputs(KINDS["5B"], batch=1), branch="cond")


@pytest.mark.slow  # whole runs
def test_an_edit_shares_tokens_but_not_rows_and_a_capture_nothing(ranks: AllRanks) -> None:
    expected: Any = edited(None)
    for found in ranks(2).run(edited, P(ulysses=2)):
        assert rel_rms(found, expected) < SPLIT_CACHE_FP32
    assert set(ranks(2).run(edited, P(cfg=2))) == {
        "parallel: got cfg=2 with an edit, whose attention sees two rows at once, want cfg=1"
    }
    for error in ranks(2).run(captured):
        assert error == (
            "parallel: got cfg=1,ulysses=2,ring=1 with a capture, which needs all tokens and heads, want one process"
        )


def captured() -> str:
    pipe = cogvid.load("tiny-t2v", device="cpu", dtype="float32", parallel=P(ulysses=2))
    with pytest.raises(ValueError, match=r"^parallel: ") as error, capture_attention(pipe, "never", steps=[0]):
        pass
    return str(error.value)


def edited(split: Parallel | None) -> Tensor | str:
    pipe = cogvid.load("tiny-t2v", device="cpu", dtype="float32", parallel=split)
    video = torch.linspace(0, 255, 9 * 64 * 64 * 3).reshape(9, 64, 64, 3).to(torch.uint8)
    inversion = cogvid.invert(pipe, video, num_inference_steps=2, seed=1, progress=False)
    try:
        return cogvid.edit(pipe, inversion, "a blue square", output_type="latent", seed=1, progress=False).frames
    except ValueError as error:
        return str(error)

"""Weights in shards: the same bits as whole ones, 1/N of the bytes at rest, and one block in full at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bench_parallel import Counter
from cogvid.config import TransformerConfig, VAEConfig
from cogvid.models.text import TextEncoder
from cogvid.models.transformer import Transformer
from cogvid.ops import Ops, can_fuse
from cogvid.parallel import shard
from cogvid.parallel.costs import bytes_of_block, bytes_of_gather
from cogvid.parallel.mesh import make_mesh
from cogvid.parallel.shard import shard_weights
from cogvid.parallel.transformer import split_transformer
from cogvid.run.compiled import compile_modules
from cogvid.weights.checkpoint import read_config
from cogvid.weights.files import load_state
from cogvid.weights.hub import PACKS, WEIGHTS
from cogvid.weights.load import make_text_encoder, make_transformer, make_vae
from cogvid.weights.lora import Loras
from cogvid.weights.lora_file import Adapter, Update
from cogvid.weights.lora_option import Lora
from cogvid.weights.parallel_option import Parallel
from cogvid.weights.placement import Placement, resolve_placement
from measure import rel_rms
from tests.distributed.models import mesh_of
from tests.distributed.ranks import Ranks
from tests.tolerances import SPLIT_FP32

CPU = torch.device("cpu")
# 3 blocks, with numbers of rows that neither 2 nor 3 processes share evenly.
CONFIG = TransformerConfig(
    num_attention_heads=1, attention_head_dim=64, num_layers=3, text_embed_dim=20, time_embed_dim=23, in_channels=5,
    out_channels=5, max_text_seq_length=7, sample_frames=9, sample_height=4, sample_width=6,
    use_rotary_positional_embeddings=True,
)  # fmt: skip


class _T5(nn.Module):
    """As much of T5 as `shard_weights` knows: `encoder.block`, and an embedding beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(50, 24)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(ids)
        return nn.Sequential(*self.encoder.get_submodule("block").children())(x)


def _text_encoder() -> Any:
    torch.manual_seed(1)
    return SimpleNamespace(t5=_T5().requires_grad_(False))


def _transformer(**changed: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(CONFIG, **changed))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def _inputs(model: Transformer, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(rows, model.config.in_channels, 3, 4, 6, generator=generator)
    text = torch.randn(rows, model.config.max_text_seq_length, model.config.text_embed_dim, generator=generator)
    return latents.to(model.dtype), text.to(model.dtype), torch.full((rows,), 500)


def _mesh() -> Any:
    size = torch.distributed.get_world_size()
    return make_mesh(Parallel(ulysses=size), CPU)


def _at_rest(model: nn.Module) -> tuple[int, int]:
    """Return the bytes that this process keeps of a sharded model, and those of the whole model."""
    parts = [p for p in model.parameters() if isinstance(p, DTensor)]
    return sum(p.to_local().untyped_storage().nbytes() for p in parts), sum(p.nbytes for p in model.parameters())


class _Watch:
    """Count at each call of a leaf how many units are whole. fused: whether each plain linear could be fused then."""

    def __init__(self, model: nn.Module, blocks: Any) -> None:
        self.most, self.fused = 0, True
        inside = {leaf for block in blocks for leaf in block.modules()}
        units = [list(block.modules()) for block in blocks] + [[m for m in model.modules() if m not in inside]]
        is_whole = lambda unit: any(type(p) is nn.Parameter for m in unit for p in m._parameters.values())  # noqa: E731

        def look(leaf: nn.Module, *_: object) -> None:
            self.most = max(self.most, sum(map(is_whole, units)))
            self.fused &= all(type(p) is nn.Parameter for p in leaf.parameters())

        self.handles = [
            leaf.register_forward_pre_hook(look)
            for leaf in model.modules()
            if not list(leaf.children()) and list(leaf.parameters())
        ]


def test_a_sharded_model_has_the_same_bits_and_a_part_of_the_bytes(ranks: Callable[[int], Ranks]) -> None:
    for found in ranks(2).run(_same_bits):
        assert found["equal"] == [True] * 3, found
        assert found["watched"] < SPLIT_FP32  # hooks on norms and linears keep operations from being fused
        assert found["most"] == 2  # a block, and the rest
        assert found["fused_inside"]
        assert not found["fusable_at_rest"]
        for mine, whole in found["bytes"]:
            assert mine / whole == pytest.approx(1 / 2, rel=0.05)
        assert found["again"].startswith("shard_weights: got a DTensor at ")


def _same_bits() -> dict[str, Any]:
    model, text_encoder = _transformer(), _text_encoder()
    ids, inputs = torch.tensor([[3, 49, 0]]), _inputs(model)
    fused, ops = [], Ops.torch()

    def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        fused.append(type(weight) is nn.Parameter and weight.shape == (256, 64))
        return ops.linear_gelu(x, weight, bias)

    before = model(*inputs), text_encoder.t5(ids)
    shard_weights(model, text_encoder, _mesh())
    model.set_ops(dataclasses.replace(ops, linear_gelu=linear_gelu))
    equal = [torch.equal(model(*inputs), before[0]), torch.equal(text_encoder.t5(ids), before[1])]
    calls = list(fused)
    watches = [_Watch(model, model.blocks), _Watch(text_encoder.t5, text_encoder.t5.encoder.block)]
    with torch.inference_mode():
        watched = rel_rms(model(*inputs), before[0])
        equal += [torch.equal(text_encoder.t5(ids), before[1])]
    try:
        shard_weights(model, text_encoder, _mesh())
        again = ""
    except ValueError as error:
        again = str(error)
    return {
        "equal": equal,
        "watched": watched,
        "again": again,
        "most": max(watch.most for watch in watches),
        "fused_inside": calls == [True] * 3 and all(watch.fused for watch in watches),
        "fusable_at_rest": any(
            can_fuse(m, type(m)) for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm)
        ),
        "bytes": [_at_rest(model), _at_rest(text_encoder.t5)],
    }


def test_adapters_take_effect_before_and_after_sharding_or_are_refused(ranks: Callable[[int], Ranks]) -> None:
    for found in ranks(2).run(_adapters):
        assert all(found["changed"]), found
        assert found["equal"] == [True] * 6, found
        refusals = found["refused"]
        assert [each.split(":")[0] for each in refusals] == ["fuse_lora", "lora", "fuse_lora"], refusals
        assert all(", want " in each for each in refusals)


def _adapters() -> dict[str, Any]:
    inputs, mesh = _inputs(_transformer()), _mesh()
    updates = {
        path: Update(torch.full((2, 64), 0.02), torch.full((64, 2), 0.05), 1.0)
        for path in ("blocks.0.q_proj", "blocks.2.v_proj")
    }

    def adapter(fused: bool = False) -> Adapter:
        return Adapter(Lora("a", 2.0, "a", fused=fused), updates)

    whole = _transformer()
    plain, loras = whole(*inputs), Loras(whole)
    loras.add([adapter()])
    beside = whole(*inputs)
    fused_model = _transformer()
    fused_loras = Loras(fused_model)
    fused_loras.add([adapter(fused=True)])
    fused = fused_model(*inputs)

    after = _transformer()
    shard_weights(after, _text_encoder(), mesh)
    after_loras = Loras(after)
    after_loras.add([adapter()])
    equal = [torch.equal(after(*inputs), beside)]
    refused = [_refusal(after_loras.fuse)]
    equal += [torch.equal(after(*inputs), beside)]
    after_loras.unload(None)
    equal += [torch.equal(after(*inputs), plain)]

    shard_weights(whole, _text_encoder(), mesh)
    equal += [torch.equal(whole(*inputs), beside)]
    loras.unload(None)
    equal += [torch.equal(whole(*inputs), plain)]

    shard_weights(fused_model, _text_encoder(), mesh)
    equal += [torch.equal(fused_model(*inputs), fused)]
    refused += [_refusal(lambda: fused_loras.unload(None)), _refusal(lambda: fused_loras.scale("a", 3.0))]
    return {
        "changed": [not torch.equal(plain, beside), not torch.equal(plain, fused)],
        "equal": equal,
        "refused": refused,
    }


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("split", [Parallel(cfg=2), Parallel(ulysses=2)], ids=str)
def test_a_split_transformer_can_be_sharded(ranks: Callable[[int], Ranks], split: Parallel) -> None:
    _check_split(ranks, split)


@pytest.mark.parametrize("split", [Parallel(cfg=2), Parallel(ulysses=2), Parallel(ring=2)], ids=str)
def test_what_is_sent_and_gathered_is_what_a_plan_says(ranks: Callable[[int], Ranks], split: Parallel) -> None:
    for rank, found in enumerate(ranks(2).run(_sent, split)):
        block = bytes_of_block(split, rank, 2, 25, 2, 64, 4)  # 7 text tokens and 18 of video
        assert found["sent"] == 3 * block.sent + bytes_of_gather(split, rank, 2, 25, 128, 4).sent
        # `DevicesPlan.gathered`; rows that are filled up to be of one number are sent too.
        assert found["gathered"] == pytest.approx(found["whole"] / 2, rel=0.05)


def _sent(split: Parallel) -> dict[str, int]:
    model, gathered = _transformer(num_attention_heads=2), 0
    split_transformer(model, mesh_of(split))
    # What FSDP2 calls is named otherwise before PyTorch 2.13.
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(torch.distributed, name)

    def counted(output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> Any:
        nonlocal gathered
        gathered += output_tensor.nbytes - input_tensor.nbytes
        return gather(output_tensor, input_tensor, **options)

    with Counter()() as counter:
        model(*_inputs(model), branch="both")
    shard_weights(model, _text_encoder(), _mesh())
    with patch.object(torch.distributed, name, counted):
        model(*_inputs(model), branch="both")
    return {"sent": counter.sent, "gathered": gathered, "whole": sum(p.nbytes for p in model.parameters())}


@pytest.mark.slow  # 4 processes
@pytest.mark.parametrize(
    "split",
    [Parallel(ring=2), Parallel(cfg=2, ulysses=2), Parallel(cfg=2, ring=2), Parallel(ulysses=2, ring=2)],
    ids=str,
)
def test_every_split_can_be_sharded(ranks: Callable[[int], Ranks], split: Parallel) -> None:
    _check_split(ranks, split)


def _check_split(ranks: Callable[[int], Ranks], split: Parallel) -> None:
    for found in ranks(split.devices).run(_split, split):
        assert found["sharded"]
        assert found["most"] == 2
        for shape, error in found["errors"].items():
            assert error < SPLIT_FP32, shape


def _split(split: Parallel) -> dict[str, Any]:
    """Split before and after sharding; with one row, the second group of cfg=2 has none, but must gather weights."""
    errors, most, sharded = {}, 0, True
    for split_first in (True, False):
        whole, model = _transformer(num_attention_heads=2), _transformer(num_attention_heads=2)
        if split_first:
            split_transformer(model, mesh_of(split))
        shard_weights(model, _text_encoder(), _mesh())
        if not split_first:
            split_transformer(model, mesh_of(split))
        watch = _Watch(model, model.blocks)
        for rows in (2, 1, 3):
            branch = "both" if rows == 2 else "cond"
            found = model(*_inputs(model, rows), branch=branch)
            errors[rows, split_first] = rel_rms(found, whole(*_inputs(model, rows), branch=branch))
        most = max(most, watch.most)
        sharded &= all(isinstance(p, DTensor) for p in model.parameters())
    return {"errors": errors, "most": most, "sharded": sharded}


def test_one_process_has_nothing_to_share() -> None:
    with pytest.raises(ValueError, match=r"^shard_weights: got it for one process, want several"):
        resolve_placement(device="cpu", shard_weights=True)


@pytest.mark.parametrize("option", [{"offload": "block"}, {"offload": "model"}, {"quantize": "int8"}])
def test_what_cannot_be_had_with_shards_is_refused(monkeypatch: pytest.MonkeyPatch, option: dict[str, str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve_placement(device="cpu", shard_weights=True, quantize="fp8-storage")("float32").shard_weights
    with pytest.raises(ValueError, match=r"^shard_weights: got it with \w+='\w+', want "):
        resolve_placement(device="cpu", shard_weights=True, **option)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("float16", None), ("float32", "fp8-storage")]
)
def test_a_pack_with_its_t5_on_three_processes(ranks: Callable[[int], Ranks], dtype: str, quantize: str | None) -> None:
    for found in ranks(3).run(_of_pack, dtype, quantize):
        assert found["equal"] == [True, True], found
        assert found["most"] == 2
        assert len(found["brought"]) == found["units"]
        assert max(found["brought"]) <= 1  # the others are still files, or shards
        assert found["dtypes"] == ({"torch.float16", "torch.float32"} if dtype == "float16" else {f"torch.{dtype}"})
        assert found["vae"]
        for mine, whole in found["bytes"]:
            assert mine / whole == pytest.approx(1 / 3, rel=0.05)


def _of_pack(dtype: str, quantize: str | None) -> dict[str, Any]:
    """Load the parts of a pack whole and for shards, and run both. fp16 is run on a CPU here, slowly, for T5's `wo`."""
    directory = PACKS / "tiny-t2v"
    states = {part: load_state(directory / part, basename) for part, basename in WEIGHTS.items()}

    def parts(shard_weights: bool) -> tuple[Transformer, TextEncoder]:
        options: dict[str, Any] = {"quantize": quantize, "shard_weights": shard_weights}
        placement = Placement(CPU, getattr(torch, dtype), Ops.torch(), "torch", **options)
        folders = directory / "text_encoder", directory / "tokenizer"
        encoder = make_text_encoder(*folders, dict(states["text_encoder"]), placement)
        config = read_config(directory / "transformer", "transformer", TransformerConfig)
        vae = make_vae(read_config(directory / "vae", "vae", VAEConfig), states["vae"], placement, directory / "vae")
        kept.append({str(p.dtype) for p in vae.parameters()})
        return make_transformer(config, states["transformer"], placement, directory / "transformer"), encoder

    kept: list[set[str]] = []
    model, encoder = parts(False)
    inputs = _inputs(model)
    before = encoder(["the red circle moves right"], 16), model(*inputs)
    dtypes = {str(p.dtype) for p in encoder.t5.parameters()}
    model, encoder = parts(True)
    units = [*model.blocks, model, *encoder.t5.encoder.block, encoder.t5]
    blocks, rests = {*model.blocks, *encoder.t5.encoder.block}, {model, encoder.t5}
    brought: list[int] = []
    fully_shard = shard.fully_shard

    def counted(unit: nn.Module, **options: Any) -> None:
        """Count the units that came, so that they are neither mapped nor sharded; 8-bit weights rest in memory."""
        there = 0
        for each in units:
            inner = {m for block in blocks for m in block.modules()} if each in rests else set()
            own = [p for m in each.modules() if m not in inner for p in m._parameters.values() if p is not None]
            came = [p for p in own if type(p) is nn.Parameter and p.ndim > 1 and p.dtype != torch.float8_e4m3fn]
            there += any(not _is_stored(p, states) for p in came)
        brought.append(there)
        fully_shard(unit, **options)

    with patch.object(shard, "fully_shard", counted):
        shard_weights(model, encoder, _mesh())
    equal = [
        torch.equal(encoder(["the red circle moves right"], 16), before[0]),
        torch.equal(model(*inputs), before[1]),
    ]
    watches = [_Watch(model, model.blocks), _Watch(encoder.t5, encoder.t5.encoder.block)]
    encoder(["the red circle moves right"], 16)
    model(*inputs)
    return {
        "equal": equal,
        "most": max(watch.most for watch in watches),
        "brought": brought,
        "units": len(units),
        "dtypes": dtypes - {"torch.float8_e4m3fn"},
        "vae": kept[1] == {f"torch.{dtype}"},
        "bytes": [_at_rest(model), _at_rest(encoder.t5)],
    }


@pytest.mark.slow
def test_compiled_blocks_can_be_sharded(ranks: Callable[[int], Ranks]) -> None:
    for found in ranks(2).run(_compiled):
        assert all(each < SPLIT_FP32 for each in found["errors"]), found
        assert found["graphs"] == 1  # of all blocks
        assert found["sharded"]


def _compiled() -> dict[str, Any]:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = _transformer()
    inputs = _inputs(model)
    before = model(*inputs)
    compile_modules(model.blocks, backend)
    shard_weights(model, _text_encoder(), _mesh())
    errors = []
    with torch.no_grad():
        errors += [rel_rms(model(*inputs), before) for _ in range(2)]
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    return {"errors": errors, "graphs": len(graphs), "sharded": sharded}


def _is_stored(parameter: nn.Parameter, states: dict[str, Any]) -> bool:
    return any(parameter.data_ptr() == each.data_ptr() for state in states.values() for each in state.values())

"""The plan of a run on several devices: the split, and each rank's part, bytes, FLOPs and memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cogvid import cli
from cogvid.config import CONFIGS
from cogvid.models.vae import CONV_ELEMENTS
from cogvid.ops import Ops
from cogvid.parallel import costs as traffic
from cogvid.run import costs
from cogvid.run.costs import Kernels
from cogvid.run.machine import Machine
from cogvid.run.plan import OFFICIAL, make_plan, survey
from cogvid.run.plan_devices import Asked, DevicesPlan, piece_activations, plan_devices, rank_parts
from cogvid.weights.parallel_option import Parallel
from cogvid.weights.placement import Placement

HUGE = Machine("cpu", 10**15, 10**15)
SIZE = (13, 60, 90)
SPLITS = [Parallel(*each) for each in ((1, 1, 1), (2, 1, 1), (1, 4, 1), (1, 7, 1), (1, 1, 3), (2, 3, 2), (2, 8, 4))]


def planned(name: str, placement: dict[str, Any] | None = None, **asked: Any) -> DevicesPlan:
    subject = survey(CONFIGS[name].repo or name)
    where = Placement(torch.device("cpu"), torch.bfloat16, Ops.torch(), "torch", **placement or {})
    options = asked.pop("options", {})
    plan = make_plan(subject, task=subject.model.tasks[0], machine=HUGE, dtype=torch.bfloat16, **options)
    return plan_devices(subject, where, plan, Asked(**asked))


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b-i2v"])
def test_the_flops_of_all_ranks_are_those_of_one_device(name: str, split: Parallel) -> None:
    config, rows, length = CONFIGS[name].transformer, 2, 226
    size = SIZE if config.patch_size_t is None else (22, 96, 170)
    ranks = [rank_parts(config, split, rank, rows, length, size) for rank in range(split.devices)]
    whole = {rank["whole"] for rank in ranks}
    assert len(whole) == 1  # the embedding and the last projection, which each process does
    total = sum(rank["linears"] + rank["attention"] for rank in ranks) + whole.pop()
    # Each process of a group has the modulation of its rows, which is one token's work.
    again = (
        (split.ulysses * split.ring - 1) * rows * config.num_layers * 24 * config.time_embed_dim * config.hidden_size
    )
    assert total == costs.transformer_flops(config, rows, length, size) + again


def test_each_rank_has_the_bytes_of_the_formulas() -> None:
    found = planned("cogvideox-5b", devices=16, per_node=8)
    assert found.split == {"cfg": 2, "ulysses": 8, "ring": 1}
    split = Parallel(2, 8, 1)
    for rank in found.ranks:
        block = traffic.bytes_of_block(split, rank.rank, 2, 17776, 48, 64, 2)
        end = traffic.bytes_of_gather(split, rank.rank, 2, 17776, 3072, 2)
        assert (rank.sent, rank.received) == (42 * block.sent + end.sent, 42 * block.received + end.received)
    assert sum(rank.sent for rank in found.ranks) == sum(rank.received for rank in found.ranks)
    assert [rank.tokens for rank in found.ranks] == traffic.sizes(17776, 8) * 2
    assert {rank.heads for rank in found.ranks} == {6}
    assert {rank.rows for rank in found.ranks} == {1}
    assert found.vae_rows == 4


@pytest.mark.parametrize(
    ("asked", "split", "why"),
    [
        ({"devices": 1}, (1, 1, 1), r"^one device$"),
        ({"devices": 8}, (2, 4, 1), r"^the two branches of guidance exchange nothing within a step; an all-to-all "),
        ({"devices": 3}, (1, 3, 1), r"^an odd number does not divide by the two branches of guidance; an all-to-all "),
        ({"devices": 64, "per_node": 8}, (2, 8, 4), r"; a ring shares what is left, because a node has 8 devices$"),
        ({"devices": 53}, (1, 1, 53), r"; a ring shares what is left, because there are 48 heads$"),
        ({"devices": 2, "options": {"guidance_scale": 1.0}}, (1, 2, 1), r"^an all-to-all over heads moves less than"),
        ({"parallel": Parallel(2, 1, 4)}, (2, 1, 4), r"^as asked; the rule would take cfg=2,ulysses=4,ring=1$"),
        ({"devices": 8, "parallel": Parallel(2, 4, 1)}, (2, 4, 1), r"^as asked$"),
    ],
)
def test_the_split_and_why(asked: dict[str, Any], split: tuple[int, int, int], why: str) -> None:
    found = planned("cogvideox-5b", **asked)
    assert found.split == dict(zip(("cfg", "ulysses", "ring"), split, strict=True))
    assert re.search(why, found.why)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"devices": 0}, "devices: got 0, want an integer"),
        ({"devices": 8, "per_node": 3}, "per_node: got 3 for 8 devices, want a divisor"),
        (
            {"devices": 4, "parallel": Parallel(2, 4, 1)},
            "devices: got 4 with a split cfg=2,ulysses=4,ring=1 of 8, want",
        ),
        ({"parallel": Parallel(1, 49, 1)}, "parallel: got ulysses=49 for a model of 48 heads, want at most 48"),
        ({"parallel": Parallel(1, 48, 400)}, "parallel: got cfg=1,ulysses=48,ring=400 for 17776 tokens, want ulysses"),
        ({"devices": 1, "shard_weights": True}, "shard_weights: got it for one device, want several"),
        (
            {"devices": 2, "shard_weights": True, "placement": {"offload": "block"}},
            "shard_weights: got it with offload='block', want one of the two",
        ),
        (
            {"devices": 2, "shard_weights": True, "placement": {"quantize": "int8"}},
            "shard_weights: got it with quantize='int8', want",
        ),
    ],
)
def test_what_cannot_be_is_said(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        planned("cogvideox-5b", **asked)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_activations_of_one_device_are_those_of_the_plan_and_fall_with_devices(itemsize: int) -> None:
    config, kernels = CONFIGS["cogvideox-5b"].transformer, Kernels(CONV_ELEMENTS["cuda"], True, True)
    arguments = 2, 226, SIZE, itemsize, kernels
    assert piece_activations(config, Parallel(), *arguments) == costs.transformer_activations(config, *arguments)
    for series in ([Parallel(ulysses=n) for n in (2, 4, 8, 16)], [Parallel(ring=n) for n in (2, 4, 8, 16)]):
        kept = [piece_activations(config, split, *arguments) for split in series]
        assert all(after < before for before, after in itertools.pairwise(kept)) or kept[-1] == kept[-2]
        whole = 2 * 17776 * 3072 * itemsize
        assert min(kept) >= 4 * whole  # what is gathered at the end


def test_shards_have_a_part_of_the_weights_and_two_blocks() -> None:
    whole, shards = planned("cogvideox-5b", devices=8), planned("cogvideox-5b", devices=8, shard_weights=True)
    count = {part: sum(counts.values()) for part, counts in OFFICIAL["cogvideox-5b"].items()}
    vae = count["vae_encoder"] + count["vae_decoder"]
    held = 2 * (vae + (count["transformer"] + count["text_encoder"]) // 8)
    for before, after in zip(whole.memory, shards.memory, strict=True):
        # Decoding has nothing gathered: what is less is the part of the weights that is elsewhere.
        less = before.phases["decode"] - after.phases["decode"]
        assert less == pytest.approx(2 * sum(count.values()) - held, rel=1e-3)
    transformer = costs.transformer_shape(CONFIGS["cogvideox-5b"].transformer, count["transformer"])
    rest = transformer.total - 42 * transformer.block
    # On CUDA the next block is gathered while one runs.
    cpu, cuda = (memory.phases["denoise"] for memory in shards.memory)
    kept = cuda - held - 2 * (rest + 2 * transformer.block)
    assert 0 < kept < 10**10
    assert shards.gathered == 2 * transformer.total * 7 // 8
    assert whole.gathered == 0
    assert cpu > 0


def test_a_group_without_work_is_warned_of() -> None:
    found = planned("cogvideox-5b", devices=2, options={"guidance_interval": (0.0, 0.5), "num_inference_steps": 10})
    assert found.split["cfg"] == 2
    assert found.warnings[0].startswith("parallel: half of the devices compute nothing in 5 of 10 steps")


def test_the_command_prints_it_and_gives_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "zai-org/CogVideoX-5b", "--dtype", "bfloat16", "--devices", "16", "--per-node", "8"]
    assert cli.main([*asked, "--shard-weights"]) == 0
    said = capsys.readouterr().out
    assert "split     cfg=2,ulysses=8,ring=1 on 16 devices in 2 nodes: the two branches" in said
    assert "each rank rows 1, tokens 2,222, heads 6; latent rows of the VAE 4 at most" in said
    assert "sends " in said
    assert " with 1/16 of the weights but the VAE's (in " in said
    assert cli.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["legal"]
    assert found["devices"]["balance"] == pytest.approx(1.0)
    assert len(found["devices"]["ranks"]) == 16
    assert {rank["tokens"] for rank in found["devices"]["ranks"]} == {2222}
    assert dataclasses.asdict(planned("cogvideox-5b", devices=16, per_node=8))["split"] == found["devices"]["split"]


def test_what_is_not_legal_is_a_reason(capfd: pytest.CaptureFixture[str], failed: Callable[..., str]) -> None:
    assert failed("plan", "--per-node", 2, "--devices", 5) == "per_node: got 2 for 5 devices, want a divisor"
    assert failed("plan", "--shard-weights").startswith("shard_weights: got it for one device, want several")
    assert cli.main(["plan", "--devices", "5", "--per-node", "2", "--json"]) == 2
    found = json.loads(capfd.readouterr().out)
    assert found == {"legal": False, "reasons": ["per_node: got 2 for 5 devices, want a divisor"]}

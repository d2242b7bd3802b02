"""What a run on several devices would do and cost: `cogvid plan --devices N`. Nothing is loaded.

It takes the split that is asked for or the best one, and counts for each rank what it computes, keeps and sends.
FLOPs and bytes are exact (`costs.py`, `parallel/costs.py`); memory is an estimate that was not measured.
"""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cogvid.config import TransformerConfig
from cogvid.options import check_int
from cogvid.parallel import costs as traffic
from cogvid.run import costs
from cogvid.run.costs import FLOAT32, Kernels, Shape
from cogvid.run.plan import (
    GB,
    PROCESS,
    SLACK,
    Memory,
    Mode,
    Plan,
    Subject,
    activations,
    estimate_memory,
    kernels_of,
    mode_of,
    shape_of,
    si,
)  # fmt: skip
from cogvid.weights.files import DTYPES
from cogvid.weights.parallel_option import Parallel, best_split, parse_parallel
from cogvid.weights.placement import Placement


@dataclass(frozen=True)
class Asked:
    """What was asked for. devices: None if only a split was named. per_node: devices of a node; None is all of them."""

    devices: int | None = None
    per_node: int | None = None
    parallel: Parallel | None = None
    shard_weights: bool = False


@dataclass(frozen=True)
class Rank:
    """What one process has of a step (rows of the batch, tokens, heads in attention) and does in it.

    flops: of the transformer. sent, received: bytes, without those of weights.
    """

    rank: int
    rows: int
    tokens: int
    heads: int
    flops: int
    sent: int
    received: int


@dataclass(frozen=True)
class DevicesPlan:
    """What a run on several devices would do and cost.

    split: names the sizes of its groups. why: in one line. ranks: each process's part of a step, with guidance where
    the run has it. gathered: bytes of weights that each process receives in a step, with `shard_weights`.
    vae_rows: the most latent rows of a process. memory: of rank 0, the most of all, on the plan's device and on CUDA;
    phases as in `plan.Memory`. warnings: one line each.
    """

    devices: int
    per_node: int
    split: dict[str, int]
    why: str
    shard_weights: bool
    ranks: tuple[Rank, ...]
    gathered: int
    vae_rows: int
    memory: tuple[Memory, ...]
    warnings: tuple[str, ...]

    @property
    def balance(self) -> float:
        """The most FLOPs of a rank over their mean."""
        flops = [rank.flops for rank in self.ranks]
        return max(flops) * len(flops) / sum(flops)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan ready for JSON."""
        return {**dataclasses.asdict(self), "balance": self.balance}

    def table(self) -> list[tuple[str, str]]:
        """Return the plan as rows of (name, value) to print."""
        ranks, nodes = self.ranks, self.devices // self.per_node
        split = ",".join(f"{name}={size}" for name, size in self.split.items())
        where = f"{self.devices} devices" + (f" in {nodes} nodes" if nodes > 1 else "")
        rows, tokens, heads = (_range(getattr(rank, name) for rank in ranks) for name in ("rows", "tokens", "heads"))
        flops, sent = [rank.flops for rank in ranks], [rank.sent for rank in ranks]
        weights = f"1/{self.devices} of the weights but the VAE's" if self.shard_weights else "all weights"
        lines = [
            ("split", f"{split} on {where}: {self.why}"),
            (
                "each rank",
                f"rows {rows}, tokens {tokens}, heads {heads}; latent rows of the VAE {self.vae_rows} at most",
            ),
            ("", f"{si(max(flops))} a step at most, {self.balance:.3f} times the mean"),
            ("", f"sends {_in_bytes(max(sent))} a step at most, all together {_in_bytes(sum(sent))}"),
        ]
        if self.gathered:
            lines.append(("", f"gathers {_in_bytes(self.gathered)} of weights a step"))
        for memory in self.memory:
            worst = max(memory.phases, key=lambda phase: memory.phases[phase])
            where = f"{memory.device}, {memory.dtype}, with {weights} (in {worst})"
            lines.append(("", f"{memory.peak / GB:.2f} GB at most on {where}, an estimate that was not measured"))
        return [*lines, *(("warning", text) for text in self.warnings)]


def take_asked(arguments: Namespace) -> Asked | None:
    """Take the options for several devices out of the arguments of `plan`; None if there are none.

    So that a plan for several devices can be made by one process.
    """
    parallel, shard_weights = getattr(arguments, "parallel", None), arguments.shard_weights
    vars(arguments).update(parallel=None, shard_weights=False)
    asked = Asked(arguments.devices, arguments.per_node, parse_parallel(parallel), shard_weights)
    return None if asked == Asked() else asked


def choose_split(asked: Asked, config: TransformerConfig, *, guided: bool) -> tuple[Parallel, int, str]:
    """Return the split, the devices of a node, and why it is this one.

    Raises:
        ValueError: a split that cannot be, or of another number of devices.
    """
    devices = asked.devices if asked.devices is not None else asked.parallel.devices if asked.parallel else 1
    check_int("devices", devices, 1)
    per_node = devices if asked.per_node is None else min(asked.per_node, devices)
    check_int("per_node", per_node, 1)
    heads = config.num_attention_heads
    if devices % per_node:
        raise ValueError(f"per_node: got {per_node} for {devices} devices, want a divisor")
    best = best_split(devices, heads, guided=guided, per_node=per_node)
    split = asked.parallel or best
    if split.devices != devices:
        raise ValueError(f"devices: got {devices} with a split {split} of {split.devices}, want as many")
    if split.ulysses > heads:
        raise ValueError(f"parallel: got ulysses={split.ulysses} for a model of {heads} heads, want at most {heads}")
    if asked.shard_weights and devices == 1:
        raise ValueError("shard_weights: got it for one device, want several (--devices)")
    if asked.parallel is not None:
        return split, per_node, "as asked" + ("" if split == best else f"; the rule would take {best}")
    return split, per_node, _why(split, devices, per_node, heads, guided=guided)


def _why(split: Parallel, devices: int, per_node: int, heads: int, *, guided: bool) -> str:
    said = []
    if split.cfg == 2:
        said.append("the two branches of guidance exchange nothing within a step")
    elif guided and devices > 1:
        said.append("an odd number does not divide by the two branches of guidance")
    if split.ulysses > 1:
        said.append("an all-to-all over heads moves less than a ring")
    if split.ring > 1:
        share = split.ulysses * split.ring
        most = share if per_node >= share else math.gcd(per_node, share)
        limit = f"a node has {per_node} devices" if most <= heads else f"there are {heads} heads"
        said.append(f"a ring shares what is left, because {limit}")
    return "; ".join(said) or "one device"


def plan_devices(subject: Subject, placement: Placement, plan: Plan, asked: Asked) -> DevicesPlan:
    """Say what the run of a plan would do on several devices. placement: that of the plan, on one device.

    Raises:
        ValueError: a split that cannot be; options that do not go together.
    """
    config, ops, mode = subject.model.transformer, placement.ops_name, mode_of(placement)
    split, per_node, why = choose_split(asked, config, guided=plan.guided_steps > 0)
    for name, given in (("offload", mode.offload), ("quantize", mode.quantize)):
        if asked.shard_weights and given not in (None, "fp8-storage"):
            raise ValueError(f"shard_weights: got it with {name}={given!r}, want one of the two")
    own = plan.memory[0]
    itemsize, tokens = DTYPES[own.dtype].itemsize, plan.text_tokens + plan.video_tokens
    if split.ulysses * split.ring > tokens:
        raise ValueError(f"parallel: got {split} for {tokens} tokens, want ulysses * ring at most {tokens}")
    ranks = tuple(_rank(config, split, rank, plan, tokens, itemsize) for rank in range(split.devices))
    transformer = _bytes(shape_of(subject, "transformer"), itemsize, mode)
    said = []
    if split.cfg == 2 and plan.guided_steps < plan.steps:
        idle = plan.steps - plan.guided_steps
        said.append(f"parallel: half of the devices compute nothing in {idle} of {plan.steps} steps, without guidance")
    return DevicesPlan(
        devices=split.devices,
        per_node=per_node,
        split=dataclasses.asdict(split),
        why=why,
        shard_weights=asked.shard_weights,
        ranks=ranks,
        gathered=transformer * (split.devices - 1) // split.devices if asked.shard_weights else 0,
        vae_rows=traffic.sizes(plan.size[1], split.devices)[0],
        memory=tuple(
            _memory(subject, plan, split, device, ops if device == own.device else "triton", mode, asked.shard_weights)
            for device in dict.fromkeys((own.device, "cuda"))
        ),
        warnings=tuple(said),
    )


def _rank(config: TransformerConfig, split: Parallel, rank: int, plan: Plan, tokens: int, itemsize: int) -> Rank:
    _, ring, ulysses = traffic.place_of(split, rank)
    arguments = split, rank, plan.rows, tokens
    block = traffic.bytes_of_block(*arguments, config.num_attention_heads, config.attention_head_dim, itemsize)
    end = traffic.bytes_of_gather(*arguments, config.hidden_size, itemsize)
    return Rank(
        rank=rank,
        rows=traffic.rows_of(split, rank, plan.rows),
        tokens=traffic.sizes(tokens, split.ring * split.ulysses)[ring * split.ulysses + ulysses],
        heads=traffic.sizes(config.num_attention_heads, split.ulysses)[ulysses],
        flops=rank_flops(config, split, rank, plan.rows, plan.text_tokens, plan.size),
        sent=config.num_layers * block.sent + end.sent,
        received=config.num_layers * block.received + end.received,
    )


def rank_flops(
    config: TransformerConfig, split: Parallel, rank: int, rows: int, length: int, size: tuple[int, int, int]
) -> int:
    """Return what one call of the transformer takes on one rank; the arguments are those of `transformer_flops`.

    The blocks are divided. The embedding and the last projection are not: each process does them whole.
    """
    return sum(rank_parts(config, split, rank, rows, length, size).values())


def rank_parts(
    config: TransformerConfig, split: Parallel, rank: int, rows: int, length: int, size: tuple[int, int, int]
) -> dict[str, int]:
    """Return the FLOPs of a rank by part: "linears" and "attention" of all blocks, and "whole", what is not divided."""
    _, ring, ulysses = traffic.place_of(split, rank)
    tokens, width = length + costs.tokens(config, size), config.hidden_size
    held = traffic.sizes(tokens, split.ring * split.ulysses)[ring * split.ulysses + ulysses]
    start, stop = traffic.ring_pieces(split, tokens)[ring]
    channels = traffic.sizes(config.num_attention_heads, split.ulysses)[ulysses] * config.attention_head_dim
    mine = traffic.rows_of(split, rank, rows)
    linears = 2 * mine * config.num_layers * (12 * held * width**2 + 12 * config.time_embed_dim * width)
    attention = 4 * mine * config.num_layers * (stop - start) * tokens * channels
    without_blocks = dataclasses.replace(config, num_layers=0)
    whole = costs.transformer_flops(without_blocks, rows, length, size)
    return {"linears": linears, "attention": attention, "whole": whole}


def piece_activations(
    config: TransformerConfig,
    split: Parallel,
    rows: int,
    length: int,
    size: tuple[int, int, int],
    itemsize: int,
    kernels: Kernels,
) -> int:
    """Return the most that one call of the transformer keeps on rank 0; with one device, `transformer_activations`.

    The embedded `[rows, N, D]` is kept whole. A block keeps its input and `block_units` of the piece, or, where
    attention exchanges tokens, more: its own input, Q, K and V, what is sent and what came. A ring has the keys and
    values in one message, the next ones, and two results in fp32. After the last block each process gathers the whole
    result: what it sends, what comes, and the result in its order.
    """
    tokens = length + costs.tokens(config, size)
    inputs = costs.input_bytes(config, rows, length, size, itemsize)
    whole = rows * tokens * config.hidden_size * itemsize
    held = traffic.sizes(tokens, split.ring * split.ulysses)[0]
    piece = traffic.rows_of(split, 0, rows) * held * config.hidden_size * itemsize
    attention = (11 if split.ulysses > 1 else 5) + (4 + 3 * FLOAT32 / itemsize if split.ring > 1 else 0)
    within = whole + piece * (1 + max(costs.block_units(itemsize, kernels), attention))
    return int(within if split.devices == 1 else max(within, 4 * whole)) + inputs


def _memory(
    subject: Subject, plan: Plan, split: Parallel, device: str, ops: str, mode: Mode, shard_weights: bool
) -> Memory:
    """Estimate the peak on rank 0, which has T5 too. Without shards its weights are those of one device."""
    model, settings, rows, size = subject.model.transformer, plan.settings, plan.rows, plan.size
    dtype = plan.memory[0].dtype
    own = estimate_memory(subject, settings, device, dtype, ops, rows=rows, mode=mode)
    itemsize, kernels = DTYPES[dtype].itemsize, kernels_of(device, dtype, ops)
    whole = activations(subject, settings, device, dtype, ops, rows, mode)
    arguments = rows, plan.text_tokens, size, itemsize, kernels
    mine = {name: whole[name] * traffic.sizes(size[1], split.devices)[0] // size[1] for name in ("encode", "decode")}
    mine["text"] = whole["text"]
    mine["denoise"] = whole["denoise"] - costs.transformer_activations(model, *arguments)
    mine["denoise"] += piece_activations(model, split, *arguments)
    kept = {name: int(SLACK[device] * bytes) for name, bytes in mine.items()}
    if not shard_weights:
        phases = {name: peak + kept[name] - int(SLACK[device] * whole[name]) if name in kept else peak
                  for name, peak in own.phases.items()}  # fmt: skip
        dropped = own.phases["load"] - min(own.phases["load"], own.needed)  # pages of files that are converted
        needed = max(peak - dropped if name == "load" else peak for name, peak in phases.items())
        return dataclasses.replace(own, phases=phases, peak=max(phases.values()), needed=needed, measured=False)
    shapes = {"text": shape_of(subject, "text_encoder"), "denoise": shape_of(subject, "transformer")}
    vae = itemsize * sum(sum(subject.weights[name].values()) for name in ("vae_encoder", "vae_decoder"))
    held = vae + sum(_bytes(shape, itemsize, mode) for shape in shapes.values()) // split.devices
    held += PROCESS if device == "cpu" else 0
    here = {name: _gathered(shape, itemsize, mode, 1 if device == "cpu" else 2) for name, shape in shapes.items()}
    coming = max(_gathered(shape, itemsize, mode, 1) for shape in shapes.values())
    phases = {name: held + (kept[name] + here.get(name, 0) if name in kept else coming) for name in own.phases}
    peak = max(phases.values())
    return Memory(device, dtype, "shard weights", phases, peak, peak, held + max(here.values()), measured=False)


def _bytes(shape: Shape, itemsize: int, mode: Mode) -> int:
    small = shape.quantized if mode.quantize else 0
    return (shape.total - small) * itemsize + small


def _gathered(shape: Shape, itemsize: int, mode: Mode, at_once: int) -> int:
    """Return the bytes of the rest of a part and of as many of its blocks."""
    rest = shape.total - shape.blocks * shape.block
    block = _bytes(shape, itemsize, mode) - rest * itemsize
    return rest * itemsize + at_once * block // max(shape.blocks, 1)


def _range(values: Iterable[int]) -> str:
    found: Sequence[int] = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _in_bytes(count: int) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 1e6:.2f} MB"

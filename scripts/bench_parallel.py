"""How far one video scales over devices: measured with gloo on this machine, and computed for H200s.

    python scripts/bench_parallel.py                       # both, about 3 minutes; --json FILE keeps what was measured
    python scripts/bench_parallel.py --paper               # only what is computed (scaling_model.py)
    python scripts/bench_parallel.py --write               # both, into SCALING.md; with --measured FILE without running
    torchrun --nproc-per-node 8 scripts/bench_parallel.py --check cogvideox-5b    # on GPUs: predicted and measured

Measured are two blocks of 2B's width and the decoder of the VAE, on 1, 2 and 4 processes of one thread each. Strong
scaling has one size for all; in weak scaling the tokens, or the rows of the picture, grow with the processes. Bytes are
counted by wrapping the collectives, and must be those of `parallel/costs.py`. Seconds are by the wall and of the
processor: where the machine has other work, the second tells more.

--check runs a step of a model of some layers and says what the model on paper predicts for it on the hardware that it
measures first: products, attention, copies and messages. Run plainly, it has one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import measure
import scaling_model as paper
from cogvid.config import CONFIGS, TransformerConfig
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.ops import Ops
from cogvid.parallel import costs as traffic
from cogvid.parallel.mesh import make_mesh
from cogvid.parallel.transformer import split_transformer
from cogvid.run.costs import tokens
from cogvid.run.plan_devices import rank_flops
from cogvid.weights.parallel_option import Parallel, best_split, parse_parallel
from scaling_tables import computed, measured_table, write

TEXT = 32
SPLITS = {
    1: [Parallel()],
    2: [Parallel(cfg=2), Parallel(ulysses=2), Parallel(ring=2)],
    4: [Parallel(2, 2, 1), Parallel(2, 1, 2), Parallel(ulysses=4), Parallel(ring=4), Parallel(1, 2, 2)],
}  # fmt: skip
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured. latents: frames, height, width on one process. vae: the same, of what is decoded."""

    transformer: TransformerConfig
    latents: tuple[int, int, int]
    vae: str
    decoded: tuple[int, int, int]
    runs: int


def _narrow(config: TransformerConfig, **changed: Any) -> TransformerConfig:
    return dataclasses.replace(config, text_embed_dim=64, max_text_seq_length=TEXT, **changed)


_2B = CONFIGS["cogvideox-2b"].transformer
SIZES = {
    "reduced": Size(_narrow(_2B, num_layers=2), (2, 16, 24), "cogvideox-2b", (1, 24, 32), 2),
    "toy": Size(_narrow(_2B, num_layers=1, num_attention_heads=4), (1, 8, 8), "tiny-t2v", (1, 8, 8), 1),
}


class Counter:
    """Count the bytes that this process sends to others, by wrapping the collectives of torch.distributed."""

    def __init__(self) -> None:
        self.sent = 0

    @contextmanager
    def __call__(self) -> Iterator[Counter]:
        all_to_all, gather, exchange = dist.all_to_all_single, dist.all_gather, dist.batch_isend_irecv

        def counted_all_to_all(
            output: Tensor, data: Tensor, out: Any = None, sizes: Any = None, group: Any = None, async_op: bool = False
        ) -> Any:
            rank, count = dist.get_rank(group), dist.get_world_size(group)
            own = sizes[rank] if sizes else data.shape[0] // count
            self.sent += data.nbytes // max(data.shape[0], 1) * (data.shape[0] - own)
            return all_to_all(output, data, out, sizes, group=group, async_op=async_op)

        def counted_gather(parts: list[Tensor], data: Tensor, group: Any = None, async_op: bool = False) -> Any:
            self.sent += data.nbytes * (len(parts) - 1)
            return gather(parts, data, group=group, async_op=async_op)

        def counted_exchange(messages: list[Any]) -> Any:
            self.sent += sum(each.tensor.nbytes for each in messages if each.op is dist.isend)
            return exchange(messages)

        with (
            patch.object(dist, "all_to_all_single", counted_all_to_all),
            patch.object(dist, "all_gather", counted_gather),
            patch.object(dist, "batch_isend_irecv", counted_exchange),
        ):
            yield self


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="reduced", choices=SIZES)
    parser.add_argument("--parts", nargs="+", default=["transformer", "vae"], choices=["transformer", "vae"])
    parser.add_argument("--processes", nargs="+", type=int, default=list(SPLITS), choices=SPLITS)
    parser.add_argument("--json", metavar="FILE", help="write what was measured there")
    parser.add_argument("--measured", metavar="FILE", help="take what was measured from there instead of measuring")
    parser.add_argument("--paper", action="store_true", help="measure nothing")
    parser.add_argument("--write", action="store_true", help="write scripts/SCALING.md")
    parser.add_argument("--check", metavar="MODEL", choices=paper.MODELS, help="a step, predicted and measured")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="of the model that --check runs")
    parser.add_argument("--latents", type=int, nargs=3, metavar="N", help="frames, height, width for --check")
    parser.add_argument("--parallel", metavar="SPLIT", help="for --check, such as cfg=2,ulysses=4; else the best one")
    args = parser.parse_args(argv)
    if args.check:
        check(args)
        return
    found = None
    if args.measured:
        found = json.loads(Path(args.measured).read_text())
    elif not args.paper:
        command = " ".join(["python scripts/bench_parallel.py", *(sys.argv[1:] if argv is None else argv)])
        torch.set_num_threads(1)  # as the processes have, which the header tells
        found = {"header": measure.header(CPU, command), "rows": []}
        for count in args.processes:
            found["rows"] += run_on(count, args.size, args.parts)
            if args.json:  # what is there so far
                Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(computed()))
    if found is not None:
        print("\n".join(measured_table(found)))
    if args.write:
        write(found)


def run_on(count: int, size: str, parts: list[str]) -> list[dict[str, Any]]:
    """Measure everything on so many processes, and return one row for each case."""
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": 1}
    torch.multiprocessing.spawn(_worker, (count, env, size, parts, answers), nprocs=count)
    return answers.get()


def _worker(rank: int, count: int, env: dict[str, Any], size: str, parts: list[str], answers: Any) -> None:
    os.environ.update({name: str(value) for name, value in env.items()}, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for split in SPLITS[count]:
        for scaling in ("strong", "weak"):
            if "transformer" in parts:
                rows.append(_bench_transformer(SIZES[size], split, scaling))
                if rank == 0:
                    print(f"{split}, {scaling}: {rows[-1]['wall']:.2f} s", file=sys.stderr)
            if "vae" in parts and split == SPLITS[count][0]:
                rows.append(_bench_vae(SIZES[size], split, scaling))
    if rank == 0:
        answers.put(rows)
    dist.destroy_process_group()


def _bench_transformer(size: Size, split: Parallel, scaling: str) -> dict[str, Any]:
    """Time a step with guidance. Weak: the frames, and so the tokens, grow with the processes."""
    config, (frames, height, width) = size.transformer, size.latents
    latents = (frames * (split.devices if scaling == "weak" else 1), height, width)
    model = _random(Transformer, config)
    split_transformer(model, make_mesh(split, CPU))
    inputs = torch.randn(2, config.in_channels, *latents), torch.randn(2, TEXT, config.text_embed_dim)
    rank, total = dist.get_rank(), TEXT + tokens(config, latents)
    heads, hd, itemsize = config.num_attention_heads, config.attention_head_dim, 4
    block = traffic.bytes_of_block(split, rank, 2, total, heads, hd, itemsize)
    formula = config.num_layers * block.sent
    formula += traffic.bytes_of_gather(split, rank, 2, total, config.hidden_size, itemsize).sent
    flops = rank_flops(config, split, rank, 2, TEXT, latents)
    step = lambda: model(*inputs, torch.full((2,), 500), branch="both")  # noqa: E731
    return {"part": "transformer", "scaling": scaling, **_timed(step, split, size.runs, formula, flops)}


def _bench_vae(size: Size, split: Parallel, scaling: str) -> dict[str, Any]:
    """Time a decode. Weak: the rows of the picture grow with the processes."""
    from cogvid.parallel.vae import split_vae

    vae = _random(VAE, CONFIGS[size.vae].vae)
    frames, height, width = size.decoded
    latents = (frames, height * (split.devices if scaling == "weak" else 1), width)
    split_vae(vae, make_mesh(split, CPU))
    z = torch.randn(1, vae.config.latent_channels, *latents)
    return {"part": "vae", "scaling": scaling, **_timed(lambda: vae.decode(z), split, size.runs, None, None)}


def _random(kind: Any, config: Any) -> Any:
    """Make a model with the same random weights in every process."""
    torch.manual_seed(0)
    model = kind(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def _timed(
    call: Callable[[], Any], split: Parallel, runs: int, formula: int | None, flops: int | None
) -> dict[str, Any]:
    """Warm a call up, count its bytes, and time it; the figures are those of all ranks together."""
    with Counter()() as counter:
        call()
    walls, cpus = [], []
    for _ in range(runs):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    mine = {
        "wall": statistics.median(walls),
        "cpu": min(cpus),
        "sent": counter.sent,
        "formula": formula,
        "flops": flops,
    }
    every: list[Any] = [None] * split.devices
    dist.all_gather_object(every, mine)
    for each in every:
        if each["formula"] is not None and each["sent"] != each["formula"]:
            raise RuntimeError(f"bytes: got {each['sent']} on {split}, want {each['formula']} as by the formula")
    cpu = [each["cpu"] for each in every]
    return {
        "split": str(split),
        "processes": split.devices,
        "wall": max(each["wall"] for each in every),
        "cpu": max(cpu),
        "balance": max(cpu) * len(cpu) / sum(cpu),
        "sent": max(each["sent"] for each in every),
        "formula": None if formula is None else max(each["formula"] for each in every),
        "flops": None if flops is None else max(each["flops"] for each in every),
    }


def check(args: argparse.Namespace) -> None:
    """Run a step and print what was predicted beside it: in the processes of torchrun, or in one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    device = CPU
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        lines = _check(args, device, count)
        if dist.get_rank() == 0:
            print("\n".join(lines))
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def _check(args: argparse.Namespace, device: torch.device, count: int) -> list[str]:
    config, size = paper.model_of(args.check)
    config = dataclasses.replace(config, num_layers=args.layers)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    best = best_split(count, config.num_attention_heads, guided=True, per_node=per_node)
    split = parse_parallel(args.parallel) or best
    size = tuple(args.latents) if args.latents else size
    cuda = device.type == "cuda"
    dtype, ops = (torch.bfloat16, Ops.triton()) if cuda else (torch.float32, Ops.torch())
    hardware = dataclasses.replace(measured_hardware(device, dtype, ops, config), per_node=per_node)
    with torch.device(device):
        torch.manual_seed(0)
        model = Transformer(config, ops).to(dtype).eval().requires_grad_(False)
        inputs = (
            torch.randn(2, config.in_channels, *size, dtype=dtype),
            torch.randn(2, config.max_text_seq_length, config.text_embed_dim, dtype=dtype),
            torch.full((2,), 500),
        )
    if split.devices > 1:
        split_transformer(model, make_mesh(split, device))
    seconds = _seconds(lambda: model(*inputs, branch="both"), device, 5 if cuda else 1)
    told = {"length": config.max_text_seq_length, "itemsize": dtype.itemsize}
    step = paper.step_time(config, size, split, hardware, **told)
    parts = {name: 1e3 * value for name, value in dataclasses.asdict(step).items() if name != "sent"}
    machine = measure.machine(device)
    return [
        f"{args.check}, {args.layers} layers, latents {size}, {dtype}, {split} on {machine}",
        f"rates: {json.dumps(dataclasses.asdict(hardware))}",
        "predicted, ms: " + ", ".join(f"{name} {value:.3g}" for name, value in parts.items()),
        f"step: predicted {1e3 * step.total:.1f} ms, measured {1e3 * seconds:.1f} ms, "
        f"measured / predicted {seconds / step.total:.2f}",
    ]


def _seconds(call: Callable[[], Any], device: torch.device, runs: int) -> float:
    """Return the median time of a call after a warm-up, on the slowest process."""
    call()
    found = []
    for _ in range(runs):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(found), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def measured_hardware(device: torch.device, dtype: torch.dtype, ops: Ops, config: TransformerConfig) -> paper.Hardware:
    """Measure the rates of a device: a product of the MLP, attention, a copy, and messages to all the others.

    All the messages count as near ones: on several nodes, what is measured is the mean of both ways.
    """
    cuda, width = device.type == "cuda", config.hidden_size
    n, m, runs = (16384, 16384, 10) if cuda else (512, 1024, 2)
    x, weight = (torch.randn(shape, dtype=dtype, device=device) for shape in ((n, width), (4 * width, width)))
    bias = torch.zeros(4 * width, dtype=dtype, device=device)
    q = torch.randn(1, m, config.num_attention_heads, config.attention_head_dim, dtype=dtype, device=device)
    linear = _seconds(lambda: torch.nn.functional.linear(x, weight, bias), device, runs)
    # A context is for operations that ask where they are; these two bundles do not.
    attention = _seconds(lambda: ops.attention(q, q, q, None), device, runs)  # pyright: ignore[reportArgumentType]
    large = torch.empty(2**28 if cuda else 2**24, dtype=torch.uint8, device=device)
    copied = torch.empty_like(large)
    copy = _seconds(lambda: copied.copy_(large), device, runs)
    rate, latency = float("inf"), 0.0
    count = dist.get_world_size()
    if count > 1:
        part = len(large) // count * count
        moved = _seconds(lambda: dist.all_to_all_single(copied[:part], large[:part]), device, runs)
        latency = _seconds(lambda: dist.all_to_all_single(copied[:count], large[:count]), device, runs)
        rate = part * (count - 1) / count / max(moved - latency, 1e-9)
    return paper.Hardware(
        linears=8 * n * width**2 / linear,
        attention=4 * m**2 * width / attention,
        memory=2 * large.numel() / copy,
        near=rate,
        far=rate,
        near_latency=latency,
        far_latency=latency,
    )


if __name__ == "__main__":
    main()

"""How long a step of the transformer takes on 1 to 64 GPUs, on paper: arithmetic alone, nothing is run.

A rank's share of the work and the bytes that it moves are exact (`run/plan_devices.py`, `parallel/costs.py`). The rates
of a device are assumptions (`Hardware`). What overlaps is what `parallel/attention.py` overlaps: in the ring, the next
keys and values travel while attention of the present ones is computed; nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from cogvid.config import CONFIGS, ModelConfig, TransformerConfig
from cogvid.parallel import costs as traffic
from cogvid.run.costs import tokens
from cogvid.run.plan_devices import rank_parts
from cogvid.weights.parallel_option import Parallel

MODELS = ("cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox1.5-5b", "cogvideox1.5-5b-i2v")
UNITS = 12  # `[rows, N, D]` that the norms, gates and rotations of a block read and write, fused
PACK_UNITS = 10  # what packing for Ulysses reads and writes: of Q, K and V once, of the output twice
RING_UNITS = 4  # what joining K and V to one message reads and writes
MERGE_UNITS = 13  # what merging each part of a ring reads and writes, in three operations of PyTorch with fp32


@dataclass(frozen=True)
class Hardware:
    """One GPU and what connects them; rates per second. Defaults: an H200, bf16.

    linears, attention: FLOPs. memory: bytes. near: bytes that a GPU sends to the others of its node, one way, while it
    receives as many. far: the same between nodes. near_latency, far_latency: seconds of one message. per_node: GPUs.
    """

    linears: float = 720e12
    attention: float = 500e12
    memory: float = 4.3e12
    near: float = 0.8 * 450e9
    far: float = 0.8 * 50e9
    near_latency: float = 10e-6
    far_latency: float = 25e-6
    per_node: int = 8


H200 = Hardware()
ASSUMPTIONS = (
    ("matrix products", "720 TFLOP/s in bf16", "peak 989 (1,071 at the highest clock); 790 is the limit by power"),
    ("attention, head width 64", "500 TFLOP/s", "published for FlashAttention-3 on an H100: 474 to 497, cuDNN on an "
     "H200: 483 to 487; PyTorch's default is near 300"),
    ("memory", "4.3 TB/s", "4.8 TB/s are specified"),
    ("NVLink", "360 GB/s each way", "900 GB/s specified for both ways together, 80 % of it assumed"),
    ("between nodes", "40 GB/s each way and GPU", "400 Gb/s specified, 80 % of it assumed; each GPU has a card"),
    ("a message", "10 us in a node, 25 us between nodes", "assumed"),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Seconds of one step of the slowest rank, by part. sent: bytes that it sends.

    linears, attention: of the blocks. elementwise: norms, gates, rotations, packing, and merging of a ring's parts.
    whole: embedding and last projection, which every rank does. ulysses, ring, gather: communication. hidden: of the
    ring's, what attention hides.
    """

    linears: float
    attention: float
    elementwise: float
    whole: float
    ulysses: float
    ring: float
    hidden: float
    gather: float
    sent: int

    @property
    def total(self) -> float:
        return self.computed + self.exposed

    @property
    def computed(self) -> float:
        return self.linears + self.attention + self.elementwise + self.whole

    @property
    def exposed(self) -> float:
        """Communication that nothing hides."""
        return self.ulysses + self.ring - self.hidden + self.gather


def recommended_size(model: ModelConfig) -> tuple[int, int, int]:
    """Return the latents (frames, height, width) of the size that a model was trained for."""
    return model.latent_size(model.height, model.width, model.num_frames)


def step_time(
    config: TransformerConfig,
    size: tuple[int, int, int],
    split: Parallel,
    hardware: Hardware = H200,
    *,
    rows: int = 2,
    length: int = 226,
    itemsize: int = 2,
) -> Step:
    """Return the time of one step; rows: of the batch, 2 with guidance. length: text tokens."""
    arguments = config, size, split, hardware, rows, length, itemsize
    ranks = range(split.ulysses * split.ring)  # of the first group, which has no fewer rows than the second
    return max((_rank_time(rank, *arguments) for rank in ranks), key=lambda step: step.total)


def _rank_time(
    rank: int,
    config: TransformerConfig,
    size: tuple[int, int, int],
    split: Parallel,
    hardware: Hardware,
    rows: int,
    length: int,
    itemsize: int,
) -> Step:
    count, total = config.num_layers, length + tokens(config, size)
    heads, hd, width = config.num_attention_heads, config.attention_head_dim, config.hidden_size
    _, ring, ulysses = traffic.place_of(split, rank)
    groups = [stop - start for start, stop in traffic.ring_pieces(split, total)]
    mine, held = traffic.rows_of(split, rank, rows), traffic.sizes(total, split.ring * split.ulysses)
    unit = mine * held[ring * split.ulysses + ulysses] * width * itemsize
    flops = rank_parts(config, split, rank, rows, length, size)

    # Every rank of a Ulysses group sends to each of the others; those in other nodes are reached by the slower way.
    first = rank - ulysses
    others = [other for other in range(first, first + split.ulysses) if other != rank]
    moved = traffic.ulysses_bytes(split, rank, rows, total, heads, hd, itemsize)
    exchange = count * _exchange(max(moved), rank, others, hardware, messages=4)

    # A ring goes on when its slowest message has come: as slow as its slowest link.
    links = [(i * split.ulysses + ulysses, (i + 1) % split.ring * split.ulysses + ulysses) for i in range(split.ring)]
    offset = rank - (ring * split.ulysses + ulysses)
    far = any((a + offset) // hardware.per_node != (b + offset) // hardware.per_node for a, b in links)
    per_head = 2 * mine * traffic.sizes(heads, split.ulysses)[ulysses] * hd
    message = _message(per_head * max(groups) * itemsize, hardware, far=far) if mine else 0.0
    of_part = 2 * per_head * groups[ring] * max(groups) / hardware.attention
    steps = count * (split.ring - 1)

    gathered = traffic.bytes_of_gather(split, rank, rows, total, width, itemsize)
    everyone = [other for other in range(split.devices) if other != rank]
    passes = UNITS + (PACK_UNITS if split.ulysses > 1 else 0)
    passes += RING_UNITS + MERGE_UNITS * split.ring if split.ring > 1 else 0
    block = traffic.bytes_of_block(split, rank, rows, total, heads, hd, itemsize)
    return Step(
        linears=flops["linears"] / hardware.linears,
        attention=flops["attention"] / hardware.attention,
        elementwise=count * passes * unit / hardware.memory,
        whole=flops["whole"] / hardware.linears,
        ulysses=exchange,
        ring=steps * message,
        hidden=steps * min(message, of_part),
        gather=_exchange(max(gathered), rank, everyone, hardware, messages=3),
        sent=count * block.sent + gathered.sent,
    )


def _exchange(nbytes: int, rank: int, others: list[int], hardware: Hardware, messages: int) -> float:
    """Return the seconds in which a rank exchanges bytes with others, an equal part with each; both ways at once."""
    if not others or not nbytes:
        return 0.0
    far = sum(other // hardware.per_node != rank // hardware.per_node for other in others) / len(others)
    latency = messages * (hardware.far_latency if far else hardware.near_latency)
    return max(nbytes * far / hardware.far, nbytes * (1 - far) / hardware.near) + latency


def _message(nbytes: float, hardware: Hardware, *, far: bool) -> float:
    if far:
        return nbytes / hardware.far + hardware.far_latency
    return nbytes / hardware.near + hardware.near_latency


def hidden_from(hardware: Hardware, *, far: bool, itemsize: int = 2) -> float:
    """Return from how many tokens of a ring piece on attention hides the ring's messages, without their latency.

    Attention of m queries to m keys takes 4 * m * m * D FLOPs, and the next keys and values are 2 * m * D elements.
    """
    return hardware.attention * itemsize / (2 * (hardware.far if far else hardware.near))


def splits(devices: int, heads: int, rows: int = 2) -> Iterator[Parallel]:
    """Yield every split of so many devices."""
    for cfg in range(1, min(rows, 2) + 1):
        share, odd = divmod(devices, cfg)
        for ulysses in range(1, share + 1) if not odd else ():
            if share % ulysses == 0 and ulysses <= heads:
                yield Parallel(cfg, ulysses, share // ulysses)


def best(
    config: TransformerConfig, size: tuple[int, int, int], devices: int, hardware: Hardware = H200, rows: int = 2
) -> tuple[Parallel, Step]:
    """Return the fastest split of so many devices, and its time."""
    found = [(each, step_time(config, size, each, hardware, rows=rows)) for each in
             splits(devices, config.num_attention_heads, rows)]  # fmt: skip
    return min(found, key=lambda pair: pair[1].total)


def counts(limit: int = 64) -> list[int]:
    return list(itertools.takewhile(lambda n: n <= limit, (2**i for i in itertools.count())))


def model_of(name: str) -> tuple[TransformerConfig, tuple[int, int, int]]:
    """Return the transformer and the recommended size of a model."""
    return CONFIGS[name].transformer, recommended_size(CONFIGS[name])


def infinite(hardware: Hardware = H200) -> Hardware:
    """Return a machine on which moving bytes takes no time."""
    free = dict.fromkeys(("memory", "near", "far"), math.inf)
    return dataclasses.replace(hardware, **free, near_latency=0.0, far_latency=0.0)

"""The specialised attention without a GPU: its own code on a CPU against fp64, every order of its steps, faults put in.

Registers and machine code are looked at in `test_compile.py`; what needs a Hopper GPU is at the end of this file.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from cogvid_kernels import _attention_ws
from cogvid_kernels._interpreter import INTERPRETED
from cogvid_kernels._key_norms import largest_key_norms
from cogvid_kernels._tiles import ATTENTION_ORDER, INTERPRETER, Tile
from cogvid_kernels.attention import VARIANTS, attention, default_variant
from cogvid_kernels.bench.registry import make_registry, without_untried
from measure import rel_rms
from tests import tolerances
from tests.kernels.ring_checker import Change, Hardware, RingError, explore, record, run
from tests.kernels.test_attention import assert_accurate, exact, make_qkv

NAME = "tma_ws_bounded"
CPU = torch.device("cpu")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The module; the package has a function of that name.
MODULE = importlib.import_module("cogvid_kernels.attention")


def on_cpu(
    q: Tensor, k: Tensor, v: Tensor, norms: Tensor | None = None, block_n: int = 128, change: Change | None = None
) -> tuple[Tensor, ...]:
    """Run the kernel's code on a CPU; return out, lse and redo. Nothing else is computed again."""
    batch, tokens, heads, _ = q.shape
    out = torch.full((batch, tokens, heads * 64), torch.nan, dtype=q.dtype)
    lse = torch.full((batch, heads, tokens), torch.nan)
    redo = torch.zeros(batch, heads, triton.cdiv(tokens, 128), dtype=torch.int32)
    norms = k.float().norm(dim=-1).amax(1) if norms is None else norms
    tile = Tile({"BLOCK_M": 192, "BLOCK_N": block_n}, 4, 4)
    arguments = _attention_ws.arguments(q, k, v, out, lse, norms, redo, 128, 64**-0.5 * 1.4426950408889634, tile)
    run(arguments, triton.cdiv(tokens, 192) * batch * heads, change)
    return out, lse, redo


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads"),
    [(1, 1, 40, 1), (2, 192, 128, 2), (1, 191, 129, 2), (2, 193, 127, 1), (1, 500, 400, 3)],
    ids=["one-query", "whole-tiles", "over-by-one", "short-by-one", "several"],
)
def test_results(batch: int, queries: int, keys: int, heads: int, dtype: torch.dtype) -> None:
    q = make_qkv(batch, queries, heads, 64, dtype, CPU)[:, :, 0]
    k, v = make_qkv(batch, keys, heads, 64, dtype, CPU, seed=1).unbind(2)[1:]
    out, lse, redo = on_cpu(q, k, v)
    assert_accurate(out, q, k, v)
    assert rel_rms(lse, exact(q, k, v)[1]) <= tolerances.ATTENTION_FP32
    assert not redo.any()


def test_smaller_tiles_and_any_strides() -> None:
    q = make_qkv(2, 40, 3, 64, torch.bfloat16, CPU)[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2)
    k = make_qkv(2, 260, 6, 64, torch.bfloat16, CPU, seed=1)[:, ::2, 1, ::2]
    v = make_qkv(1, 130, 3, 64, torch.bfloat16, CPU, seed=2)[:, :, 2].expand(2, -1, -1, -1)
    assert_accurate(on_cpu(q, k, v, block_n=64)[0], q, k, v)


def test_rows_that_leave_the_range_are_noted() -> None:
    """A query opposite to every key, in the second 128 rows, and one of NaN, which is the last."""
    q, k, v = (x.clone() for x in make_qkv(1, 400, 2, 64, torch.bfloat16, CPU).unbind(2))
    k[:] = k[:, :1] + 0.1 * k
    q[0, 200, 0] = -20 * k[0, 0, 0]
    q[0, 399, 1] = torch.nan
    _, _, redo = on_cpu(q, k, v)
    assert redo[0].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_key_norm_that_is_too_small_is_noted() -> None:
    q, k, v = make_qkv(1, 200, 1, 64, torch.float16, CPU).unbind(2)
    _, _, redo = on_cpu(q * 8, k, v, norms=torch.zeros(1, 1))
    assert redo.all()


def test_only_the_noted_tiles_are_computed_again(device: torch.device) -> None:
    """The second launch: of the online kernel, with the flags that the first one left."""
    q, k, v = make_qkv(2, 130, 2, 64, torch.bfloat16, device).unbind(2)
    out = torch.full((2, 130, 128), torch.nan, dtype=q.dtype, device=device)
    lse = torch.full((2, 2, 130), torch.nan, device=device)
    arch = MODULE.architecture(q)
    arguments = MODULE._arguments(q, k, v, out, lse, None, None, VARIANTS["pointer"], arch, None)
    per_head = triton.cdiv(130, arguments["BLOCK_M"])
    flags = torch.zeros(2, 2, per_head, dtype=torch.int32, device=device)
    flags[0, 1, 0] = flags[1, 0, per_head - 1] = 1
    MODULE._attention_kernel[(arguments["num_tiles"],)](**arguments | {"redo": flags.flatten()})
    want, want_lse = attention(q, k, v, variant="pointer", return_lse=True)
    noted = flags.bool().repeat_interleave(arguments["BLOCK_M"], 2)[..., :130]  # [B, H, N]
    assert torch.equal(lse.isnan(), ~noted)
    assert torch.equal(lse[noted], want_lse[noted])
    rows = noted.transpose(1, 2)[..., None].expand(-1, -1, -1, 64).flatten(2)
    assert torch.equal(out.isnan(), ~rows)
    assert torch.equal(out[rows], want[rows])


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("tiles", [1, 2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_every_order_is_right(slots: int, tiles: int) -> None:
    if (slots, tiles) == (4, 5):
        tiles = 4  # 60,000 states instead of 300,000: every slot is used, and the first one is waited for
    recording = record(tiles * 128 - 5, slots)
    assert len(recording.roles) == 4
    assert explore(recording) > 100 * tiles


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [5, 6, 9])
def test_every_order_of_the_ring_in_use_is_right(tiles: int) -> None:
    assert explore(record(tiles * 128, 4)) > 100_000


def drop_arrive(names: dict[str, Any], hardware: Hardware) -> None:  # noqa: ARG001
    """The second arrival of the first consumer is lost."""
    arrive, calls = hardware.mbarrier.arrive, []

    def lossy(barrier: Any, count: int) -> None:
        calls.append(barrier)
        if len(calls) != 2:
            arrive(barrier, count)

    hardware.mbarrier.arrive = lossy


def drop_wait(name: str) -> Any:
    def change(names: dict[str, Any], hardware: Hardware) -> None:  # noqa: ARG001
        wait = hardware.mbarrier.wait
        hardware.mbarrier.wait = lambda barrier, parity: None if barrier.place[0] == name else wait(barrier, parity)

    return change


def early_arrive(names: dict[str, Any], hardware: Hardware) -> None:  # noqa: ARG001
    """A slot is given back before P V has ended."""
    hardware.mbarrier.arrive = lambda barrier, count: hardware.steps.insert(-1, ("arrive", barrier.place))  # noqa: ARG005


def other(name: str, function: Any) -> Any:
    """One of the schedule's functions is another one."""
    return lambda names, _: names.update({name: function})


def bytes_times(factor: float) -> Any:
    def change(names: dict[str, Any], hardware: Hardware) -> None:  # noqa: ARG001
        expect = hardware.mbarrier.expect
        hardware.mbarrier.expect = lambda barrier, size: expect(
            barrier, int(size * factor) if barrier.place[0] == "full" else size
        )

    return change


def count_less(names: dict[str, Any], hardware: Hardware) -> None:  # noqa: ARG001
    """`empty` is complete when two of three consumers have arrived."""
    init = hardware.mbarrier.init
    hardware.mbarrier.init = lambda barrier, count: init(barrier, min(count, 2))


def leave_two(names: dict[str, Any], hardware: Hardware) -> None:
    """The logits are used while their wgmma runs."""
    names["warpgroup_mma_wait"] = lambda left, results: hardware.wait(left * 2, results)


FAULTS = {
    "an arrive is dropped": (drop_arrive, "deadlock"),
    "an arrive is early": (early_arrive, "written before it is empty"),
    "full is not waited for": (drop_wait("full"), "before it is full"),
    "queries are not waited for": (drop_wait("q_full"), "q_tiles.*before it is full"),
    "empty is not waited for": (drop_wait("empty"), "more arrivals than the phase expects"),
    "full has the wrong phase": (other("full_parity", lambda t, n: t // n & 1 ^ 1), "deadlock|before it is full"),
    "full has one phase": (other("full_parity", lambda t, n: 0), "before it is full, or the wrong tile"),  # noqa: ARG005
    "empty has the wrong phase": (other("empty_parity", lambda t, n: t // n & 1), "deadlock"),
    "empty has one phase": (other("empty_parity", lambda t, n: 1), "more arrivals"),  # noqa: ARG005
    "one slot with the phases of two": (other("slot_of", lambda t, n: 0), "more arrivals"),  # noqa: ARG005
    "too few bytes are announced": (bytes_times(0.5), "before it is full"),
    "too many bytes are announced": (bytes_times(2), "deadlock"),
    "two arrivals are enough": (count_less, "written before it is empty|more arrivals"),
    "a wait leaves too many": (leave_two, "while a wgmma writes it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(RingError, match=message):
        explore(record(5 * 128, 2, change))


def test_the_masked_tile_is_the_last_one() -> None:
    """The first trip is the one with a mask; with the tiles in order it would be a whole one."""
    q, k, v = make_qkv(1, 150, 1, 64, torch.bfloat16, CPU).unbind(2)
    k = k * 0.01  # so that the zeros after the last key would have as much weight as a key
    want = exact(q, k, v)[0]
    assert rel_rms(on_cpu(q, k, v)[0], want) < 0.01
    assert rel_rms(on_cpu(q, k, v, change=other("first_key", lambda t, _, size: t * size))[0], want) > 0.1


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float32, 64, r"^variant: got 'tma_ws_bounded' with torch.float32, want bfloat16 or float16 for TMA$"),
        (torch.bfloat16, 80, r"^variant: got 'tma_ws_bounded' with head_dim 80, want head_dim 64$"),
        (torch.bfloat16, 64, r"^variant: got 'tma_ws_bounded' .*, want compute capability 9.0$"),
    ],
    ids=["fp32", "head_dim", "place"],
)
def test_it_is_refused_before_anything_is_launched(
    dtype: torch.dtype, head_dim: int, message: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = make_qkv(1, 9, 1, head_dim, dtype, device).unbind(2)
    if device.type == "cuda" and head_dim == 64 and dtype != torch.float32:
        monkeypatch.setattr(MODULE, "architecture", lambda _: 100)
    monkeypatch.setattr(MODULE, "largest_key_norms", pytest.fail)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, variant=NAME)


def test_other_tiles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_qkv(1, 9, 1, 64, torch.bfloat16, CPU).unbind(2)
    monkeypatch.setattr(MODULE, "architecture", lambda _: 90)
    monkeypatch.setattr(MODULE, "check_runnable", lambda *_: None)
    monkeypatch.setattr(MODULE, "largest_key_norms", pytest.fail)
    with pytest.raises(ValueError, match=r"^tile: got BLOCK_M 128 and 8 warps with 'tma_ws_bounded', want 192 and 4$"):
        attention(q, k, v, variant=NAME, tile=Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3))


def test_the_default_is_the_first_of_the_table_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTION_ORDER, 90, (NAME, "tma_bounded", "pointer"))
    q, k, v = make_qkv(1, 9, 2, 64, torch.bfloat16, CPU).unbind(2)
    assert default_variant(q, k, v, 90).name == NAME
    narrow = [x[..., :40] for x in (q, k, v)]
    assert default_variant(*narrow, 90).name == "tma_bounded"
    odd = [x[..., 1:41] for x in (q, k, v)]
    assert default_variant(*odd, 90).name == "pointer"
    assert default_variant(q.float(), k.float(), v.float(), 90).name == "pointer"
    assert default_variant(q, k, v, INTERPRETER).name == "pointer"


def test_every_architecture_has_a_variant_for_any_tensor() -> None:
    assert ATTENTION_ORDER.keys() == {INTERPRETER, 80, 89, 90, 100}
    for order in ATTENTION_ORDER.values():
        assert order[-1] == "pointer"
        assert set(order) <= VARIANTS.keys()
    assert NAME not in {name for order in ATTENTION_ORDER.values() for name in order}, "it has not run on a GPU"


def test_the_benchmark_runs_it_only_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    op = next(op for op in make_registry() if op.name == "attention")
    assert without_untried(op, "").variants.keys() == VARIANTS.keys() - {NAME}
    assert "ours/tma_ws_bounded: left out" in capsys.readouterr().out
    assert without_untried(op, NAME).variants.keys() == VARIANTS.keys()


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("tokens", [1, 127, 192, 193, 640, 2000])
def test_on_hopper(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    assert not INTERPRETED
    q, k, v = (x.clone() for x in make_qkv(2, tokens, 3, 64, dtype, device).unbind(2))
    q[0, tokens // 2, 1] = -20 * k[0, 0, 1]  # computed again, in the online form
    got, lse = attention(q, k, v, variant=NAME, return_lse=True)
    assert_accurate(got, q, k, v)
    assert rel_rms(lse, exact(q, k, v)[1]) <= tolerances.ATTENTION_FP32
    assert rel_rms(largest_key_norms(k), k.double().norm(dim=-1).amax(1)) <= tolerances.KERNEL_FP32

"""The VAE by rows of the picture over several processes, against one process and against diffusers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cogvid.config import VAEConfig
from cogvid.models.tiling import TiledVAE
from cogvid.models.vae import VAE, CausalConv3d, Downsample, NormSiLU, Upsample
from cogvid.ops import Ops, channel_statistics
from cogvid.parallel.mesh import Mesh, make_mesh, pieces
from cogvid.parallel.vae import merge_statistics, split_vae
from cogvid.run.compiled import compile_modules
from cogvid.weights.names import map_vae_state_dict
from cogvid.weights.parallel_option import Parallel
from measure import pooled_ratio, rel_rms
from tests.checkpoints import VAE_CONFIG
from tests.distributed.ranks import Ranks
from tests.tolerances import OP_FP32, VAE_FP32, VAE_SPLIT_FP32, VAE_SPLIT_FP64, VAE_SPLIT_ROUNDING

OfRanks = Callable[[int], Ranks]
CPU = torch.device("cpu")

# kind, batch, frames (of latents to decode), rows and columns of latents: uneven, few and many rows, every kind of
# chunk, and fewer rows than processes.
CASES = [
    ("decode", 2, 3, 5, 3),
    ("decode", 1, 1, 1, 4),
    ("decode", 1, 4, 8, 2),
    ("encode", 2, 9, 5, 3),
    ("encode", 1, 1, 3, 2),
    ("encode", 1, 16, 1, 2),
    ("whole", 1, 17, 4, 2),
]
FEW = [CASES[0], CASES[1], CASES[3]]


def build(config: VAEConfig = VAE_CONFIG, seed: int = 0) -> VAE:
    """Return a VAE with random weights, those of the norms too; the same in all processes."""
    torch.manual_seed(seed)
    vae = VAE(config).eval().requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, NormSiLU):
            module.weight.add_(0.3 * torch.randn(module.weight.shape))
            module.bias.add_(0.3 * torch.randn(module.bias.shape))
    return vae


def inputs(config: VAEConfig, kind: str, batch: int, frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    if kind == "decode":
        return torch.randn(batch, config.latent_channels, frames, height, width, generator=generator)
    return torch.randn(batch, 3, frames, 8 * height, 8 * width, generator=generator).clamp(-1, 1)


def result(vae: VAE, kind: str, x: Tensor) -> Tensor:
    return vae.decode(x) if kind == "decode" else parameters(vae.encode(x, whole=kind == "whole"))


def parameters(found: Any) -> Tensor:
    """Return what a distribution, ours or diffusers', is made of."""
    return torch.cat([found.mean, found.logvar], dim=1)


def mesh_of_all() -> Mesh:
    return make_mesh(Parallel(ulysses=dist.get_world_size()), CPU)


def split(vae: VAE) -> VAE:
    split_vae(vae, mesh_of_all())
    return vae


def answer(x: Tensor) -> tuple[str, np.ndarray | None]:
    """Return a digest from each rank, and the values from the first one."""
    values = (x.float() if x.dtype == torch.bfloat16 else x).contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest(), values if dist.get_rank() == 0 else None


def same_on_all(answers: Sequence[Any]) -> Tensor:
    """Return the result of the ranks, which must have the same bits on each."""
    assert len({digest for digest, _ in answers}) == 1
    return torch.from_numpy(answers[0][1])


def _results(config: VAEConfig, cases: list[Any], dtype: torch.dtype = torch.float32) -> list[Any]:
    vae = split(build(config).to(dtype))
    return [answer(result(vae, case[0], inputs(config, *case).to(dtype))) for case in cases]


def check_results(ranks: Ranks, config: VAEConfig, cases: list[Any], dtype: torch.dtype, limit: float) -> None:
    vae, answers = build(config).to(dtype), ranks.run(_results, config, cases, dtype)
    for case, got in zip(cases, map(same_on_all, zip(*answers, strict=True)), strict=True):
        want = result(vae, case[0], inputs(config, *case).to(dtype))
        assert got.shape == want.shape, case
        assert rel_rms(got, want) <= limit, case


@pytest.mark.parametrize("count", [2, 3])
def test_the_result_is_that_of_one_process(ranks: OfRanks, count: int) -> None:
    check_results(ranks(count), VAE_CONFIG, FEW, torch.float32, VAE_SPLIT_FP32)


def test_it_is_exact(ranks: OfRanks) -> None:
    check_results(ranks(3), VAE_CONFIG, FEW, torch.float64, VAE_SPLIT_FP64)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, VAE_SPLIT_FP32), (torch.float64, VAE_SPLIT_FP64)])
@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_every_kind_of_video(ranks: OfRanks, count: int, dtype: torch.dtype, limit: float) -> None:
    check_results(ranks(count), VAE_CONFIG, CASES, dtype, limit)


REAL = [("decode", 1, 3, 5, 4), ("encode", 1, 9, 5, 4)]


@pytest.mark.slow
def test_the_real_config_is_exact(ranks: OfRanks) -> None:
    check_results(ranks(2), VAEConfig(), REAL, torch.float64, VAE_SPLIT_FP64)


@pytest.mark.slow
def test_the_real_config_rounds_as_one_process_does(ranks: OfRanks) -> None:
    """Not against one process: with these random weights, its own error in fp32 is 3e-6."""
    errors = errors_of(VAEConfig(), REAL, torch.float32, ranks(4).run(_results, VAEConfig(), REAL))
    assert pooled_ratio(errors) <= VAE_SPLIT_ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_bf16_is_no_worse(ranks: OfRanks, count: int) -> None:
    answers = ranks(count).run(_results, VAE_CONFIG, CASES, torch.bfloat16)
    assert pooled_ratio(errors_of(VAE_CONFIG, CASES, torch.bfloat16, answers)) <= VAE_SPLIT_ROUNDING


def errors_of(config: VAEConfig, cases: list[Any], dtype: torch.dtype, answers: list[Any]) -> list[tuple[float, float]]:
    """Return the errors of the ranks and of one process against fp64 with the same rounded weights and inputs."""
    vae, errors = build(config).to(dtype), []
    exact = copy.deepcopy(vae).double()
    for case, got in zip(cases, map(same_on_all, zip(*answers, strict=True)), strict=True):
        x = inputs(config, *case).to(dtype)
        truth = result(exact, case[0], x.double())
        errors.append((rel_rms(got, truth), rel_rms(result(vae, case[0], x), truth)))
    return errors


@pytest.mark.slow
def test_the_result_is_that_of_diffusers(ranks: OfRanks) -> None:
    from references import tiny_vae

    theirs: Any = tiny_vae()
    config = VAEConfig.from_dict(dict(theirs.config))
    x, z = inputs(config, "encode", 1, 9, 5, 4), inputs(config, "decode", 1, 3, 5, 4)
    state = map_vae_state_dict(theirs.state_dict(), config)
    answers = ranks(4).run(_with_weights, config, {name: t.numpy() for name, t in state.items()}, x.numpy(), z.numpy())
    encoded, decoded = map(same_on_all, zip(*answers, strict=True))
    assert rel_rms(encoded, parameters(theirs.encode(x).latent_dist)) <= VAE_FP32
    assert rel_rms(decoded, theirs.decode(z).sample) <= VAE_FP32


def _with_weights(config: VAEConfig, state: dict[str, np.ndarray], x: np.ndarray, z: np.ndarray) -> list[Any]:
    vae = VAE(config).eval().requires_grad_(False)
    vae.load_state_dict({name: torch.from_numpy(t) for name, t in state.items()})
    split(vae)
    return [answer(parameters(vae.encode(torch.from_numpy(x)))), answer(vae.decode(torch.from_numpy(z)))]


@pytest.mark.parametrize("mean", [10.0, 10000.0])
def test_merged_statistics_do_not_cancel(mean: float) -> None:
    x = mean + torch.randn(2, 4, 3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = torch.zeros(4, 3, 2, 4, dtype=torch.float64)  # the last part has no positions
    for part, rows in zip(parts, x.split([3, 3, 1], dim=3), strict=False):
        part[:2], part[2] = channel_statistics(rows), rows[0, 0].numel()
    found = merge_statistics(parts)
    variance, center = torch.var_mean(x, dim=(2, 3, 4), correction=0)
    assert rel_rms(found[0], center) <= 1e-15
    assert rel_rms(found[1], variance) <= 1e-15 * mean  # the mean of a part is rounded, and the difference from it


def test_a_norm_far_from_zero(ranks: OfRanks) -> None:
    """The mean is ten standard deviations, and another one on each rank."""
    x = far_from_zero()
    want = F.silu(F.group_norm(x.double(), 4, eps=1e-6))
    assert all(error <= OP_FP32 for error in ranks(3).run(_norm_error, want.numpy()))


def far_from_zero() -> Tensor:
    x = torch.randn(2, 16, 3, 8, 6, generator=torch.Generator().manual_seed(0)) + 10
    return x + torch.arange(8).view(8, 1)


def _norm_error(want: np.ndarray) -> float:
    vae, (start, stop) = split(VAE(VAE_CONFIG)), pieces(8, 3)[dist.get_rank()]
    x = far_from_zero()[:, :, :, start:stop].contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        return rel_rms(vae.encoder.norm_out(x), torch.from_numpy(want)[:, :, :, start:stop])


def test_bytes_and_memory(ranks: OfRanks) -> None:
    """What crosses each border is what the formula says, and the largest activation has the rows of its rank alone."""
    count, cases = 3, [("decode", 1, 3, 5, 3), ("encode", 2, 9, 5, 3)]
    vae, whole = build(), []
    for case in cases:
        with looked_at(vae) as found:
            result(vae, case[0], inputs(VAE_CONFIG, *case))
        whole.append(found)
    found = ranks(count).run(_sent_and_largest, cases)
    for i, (moved, largest) in enumerate(whole):
        assert sum(each[i][0] for each in found) == (count - 1) * moved
        assert [each[i][1] for each in found] == [largest * (stop - start) // 5 for start, stop in pieces(5, count)]


@contextmanager
def looked_at(vae: VAE) -> Iterator[list[int]]:
    """Add up the bytes that one border is crossed by, and find the elements of the largest output of a module."""
    found = [0, 0]

    def border(module: nn.Module, args: tuple[Any, ...]) -> None:
        batch, channels, frames, _, width = args[0].shape
        found[0] += (1 if isinstance(module, Downsample) else 2) * batch * channels * frames * width * 4

    def size(_module: nn.Module, _args: Any, out: Tensor) -> None:
        found[1] = max(found[1], out.numel())

    kinds = (CausalConv3d, Upsample, Downsample)
    handles = [m.register_forward_pre_hook(border) for m in vae.modules() if isinstance(m, kinds)]
    inside = [m for part in (vae.encoder, vae.decoder) for m in part.modules()]
    handles += [m.register_forward_hook(size) for m in inside]
    yield found
    for handle in handles:
        handle.remove()


def _sent_and_largest(cases: list[Any]) -> list[tuple[int, int]]:
    vae, found, batch, sent = split(build()), [], dist.batch_isend_irecv, 0

    def counting(transfers: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal sent
        sent += sum(each.tensor.nbytes for each in transfers if each.op is dist.isend)
        return batch(transfers)

    dist.batch_isend_irecv = counting
    try:
        for case in cases:
            sent = 0
            with looked_at(vae) as seen:
                result(vae, case[0], inputs(VAE_CONFIG, *case))
            found.append((sent, seen[1]))
    finally:
        dist.batch_isend_irecv = batch
    return found


def test_what_a_loaded_vae_does_it_goes_on_doing(ranks: OfRanks) -> None:
    """Hooks, other operations and names of weights, chunks that come one by one, and what it refuses."""
    want = build()
    want.decoder.conv_out.register_forward_hook(_double)
    case = ("decode", 1, 5, 3, 2)
    want = want.decode(inputs(VAE_CONFIG, *case))
    answers = ranks(3).run(_behaviour, case)
    assert rel_rms(same_on_all([each["result"] for each in answers]), want) <= VAE_SPLIT_FP32
    for each in answers:
        assert each["names"]
        assert each["decoded at the first chunk"] == 1
        assert each["first chunk"] == [1, 3, 9, 24, 16]
        assert each["ops"]
        assert each["refused"] == [
            "ops: got norms of your own on 2 devices, want those of 'torch' or 'triton'",
            "z: got shapes [[1, 16, 1, 2, 2], [1, 16, 2, 2, 2]], want the same on each rank",
            "vae: got a backward pass on several devices, want forward only; train on one",
            "vae: got a SplitVAE, want a VAE that is not split",
        ]


def _double(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return 2 * out


def _no_norm(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _behaviour(case: Any) -> dict[str, Any]:
    vae = build()
    vae.decoder.conv_out.register_forward_hook(_double)
    names = list(vae.state_dict())
    split(vae)
    vae.set_ops(vae.ops)
    other = dataclasses.replace(Ops.torch(), attention=_no_norm)
    vae.set_ops(other)
    z = inputs(VAE_CONFIG, *case)
    calls: list[int] = []
    handle = vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    chunks = vae.decode_chunks(z)
    first = next(chunks)
    at_first = len(calls)
    handle.remove()
    got = torch.cat([first, *chunks], dim=2)
    mine = dataclasses.replace(Ops.torch(), group_norm_silu=_no_norm)
    refused = [said(lambda: vae.set_ops(mine)), said(lambda: vae.decode(torch.zeros(1, 16, 1 + dist.get_rank(), 2, 2)))]
    with torch.enable_grad():
        loss = vae.decode(z.requires_grad_()).sum()
        refused.append(said(loss.backward))
    refused.append(said(lambda: split(vae)))
    return {
        "result": answer(got),
        "names": list(vae.state_dict()) == names,
        "decoded at the first chunk": at_first,
        "first chunk": list(first.shape),
        "ops": vae.ops is other,
        "refused": refused,
    }


def said(call: Callable[[], Any]) -> str:
    """Return the message of the error that a call raises."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


def test_what_cannot_be_split_is_refused() -> None:
    mesh = Mesh(Parallel(ulysses=2), cast("Any", None))  # it is not asked for
    compiled, own = build(), build()
    compile_modules([compiled.decoder])
    own.set_ops(dataclasses.replace(Ops.torch(), spatial_norm_silu=_no_norm))
    for vae, message in (
        (TiledVAE(VAE_CONFIG), "vae_tiling: got it on 2 devices, want one of the two, as both cut the picture"),
        (compiled, "compile: got a compiled VAE on 2 devices, want one of the two"),
        (own, "ops: got norms of your own on 2 devices, want those of 'torch' or 'triton'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            split_vae(vae, mesh)
    assert {type(module) for module in own.modules()} == {type(module) for module in build().modules()}


@pytest.mark.slow
def test_the_kernels_run_on_a_piece_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, which processes started here choose when they import the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = ("decode", 1, 3, 3, 2)
    with Ranks(2) as ranks:
        got = same_on_all(ranks.run(_with_kernels, case))
    assert rel_rms(got, build().decode(inputs(VAE_CONFIG, *case))) <= VAE_SPLIT_FP32


def _with_kernels(case: Any) -> Any:
    import cogvid_kernels

    used: set[str] = set()
    for name in ("channel_statistics", "norm_silu"):
        setattr(cogvid_kernels, name, functools.partial(_noted, used, name, getattr(cogvid_kernels, name)))
    vae = split(build())
    vae.set_ops(Ops.triton())
    got = vae.decode(inputs(VAE_CONFIG, *case))
    assert used == {"channel_statistics", "norm_silu"}
    return answer(got)


def _noted(used: set[str], name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    used.add(name)
    return function(*arguments, **options)

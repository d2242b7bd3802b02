"""The kernels as registered operators: fake implementations, gradients or a refusal, torch.compile, torch.export."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import cogvid_kernels
from cogvid import ops
from cogvid.config import TransformerConfig
from cogvid.models.transformer import Transformer
from cogvid.ops import Ops
from cogvid.run.compiled import compile_modules
from cogvid_kernels._tiles import compute_capability
from measure import rel_rms
from tests import tolerances
from tests.kernels.accuracy import DTYPES, moved, randn, results

pytestmark = pytest.mark.filterwarnings("ignore")

DIFFERENTIABLE = ("gate_residual", "linear_gelu", "rms_norm")


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not in this file: tracing takes torch.empty for what it is. The other files see to unwritten elements."""


def make(name: str) -> tuple[list[Any], dict[str, Any]]:
    """Return arguments of a public function, as a model passes them."""
    x, y = randn(2, 9, 24, seed=1), randn(2, 9, 24, seed=2)
    weight, bias = 1 + 0.3 * randn(24, seed=3), randn(24, seed=4)
    shift, scale, gate = randn(2, 2, 3, 24, seed=5).unbind(2)
    q, k, v = (randn(2, 9, 2, 16, seed=seed) for seed in (6, 7, 8))
    angle = randn(5, 8, seed=9)
    video = randn(2, 8, 5, 6, 4, seed=10).contiguous(memory_format=torch.channels_last_3d)
    latents = [randn(2, 3, 3, 2, 8, seed=seed).movedim(-1, 1) for seed in (11, 12)]
    streams, groups = {"text_len": 4, "eps": 1e-5}, {"num_groups": 4, "eps": 1e-6}
    made: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "attention": ([q, k, v], {}),
        "qk_norm_rope": ([q, k, *(randn(16, seed=s) for s in range(4)), (angle.cos(), angle.sin())], streams),
        "layer_norm_modulate": ([x, weight, bias, shift, scale], streams),
        "gate_residual": ([x, y, gate], {"text_len": 4}),
        "gate_residual_norm_modulate": ([x, y, gate, weight, bias, shift, scale], streams),
        "linear_gelu": ([x, randn(40, 24, seed=3) * 0.2, randn(40, seed=4)], {}),
        "rms_norm": ([x, weight], {"eps": 1e-6}),
        "group_norm_silu": ([video, weight[:8], bias[:8]], groups),
        "spatial_norm_silu": ([video, weight[:8], bias[:8], *latents], groups),
        "channel_statistics": ([video], {}),
        "norm_silu": ([video, ops.channel_statistics(video), weight[:8], bias[:8], *latents], groups),
    }
    return made[name]


FURTHER = {  # arguments that change an operator's outputs or what it checks
    "attention-lse": ("attention", {"return_lse": True, "scale": 0.3}),
    "attention-bounded": ("attention", {"variant": "pointer_bounded"}),
    "attention-tile": ("attention", {"tile": cogvid_kernels._tiles.Tile({"BLOCK_M": 16, "BLOCK_N": 16})}),
    "qk_norm_rope-centred": ("qk_norm_rope", {"centred": True}),
    "linear_gelu-kernel": ("linear_gelu", {"variant": "kernel"}),
}
NAMES = cogvid_kernels.__all__
CASES = {name: (name, {}) for name in NAMES} | FURTHER


def call(case: str, arguments: list[Any] | None = None) -> Any:
    name, further = CASES[case]
    made, options = make(name)
    return getattr(cogvid_kernels, name)(*(arguments or made), **options, **further)


@contextmanager
def caught_calls() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Note each call of an operator of ours: the operator and its arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "cogvid_kernels":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Note():
        yield calls


def test_every_public_function_is_an_operator_of_its_name() -> None:
    for name in NAMES:
        with caught_calls() as calls:
            call(name)
        assert [str(func) for func, _, _ in calls] == [f"cogvid_kernels.{name}.default"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.every(2)
def test_opcheck(case: str) -> None:
    with caught_calls() as calls:
        call(case)
    ((operator, args, kwargs),) = calls
    torch.library.opcheck(operator, args, kwargs)
    if CASES[case][0] in DIFFERENTIABLE:
        args = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(operator, args, kwargs)


@pytest.mark.parametrize("case", CASES)
def test_fake_outputs_are_like_the_real_ones(case: str) -> None:
    real = results(call(case))
    arguments, _ = make(CASES[case][0])
    further = CASES[case][1]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def faked(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(faked, value))
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        name = CASES[case][0]
        options = make(name)[1] | {key: faked(value) for key, value in further.items()}
        fake = results(getattr(cogvid_kernels, name)(*map(faked, arguments), **options))
    assert len(fake) == len(real)
    for f, r in zip(fake, real, strict=True):
        assert (f.shape, f.dtype, f.stride(), f.device) == (r.shape, r.dtype, r.stride(), r.device)


@pytest.mark.parametrize("case", [name for name in NAMES if name not in ("attention", "channel_statistics")])
def test_fake_and_meta_tensors_are_checked_too(case: str) -> None:
    """A weight (q's, x's) of another width is named before anything is computed."""
    arguments, options = make(case)
    arguments[1] = arguments[1][..., :-1].contiguous()
    with FakeTensorMode() as mode:
        fake = [tuple(map(mode.from_tensor, a)) if isinstance(a, tuple) else mode.from_tensor(a) for a in arguments]
        with pytest.raises(ValueError, match=r"got shape .* want"):
            getattr(cogvid_kernels, case)(*fake, **options)
    with pytest.raises(ValueError, match=r"got shape .* want"):
        getattr(cogvid_kernels, case)(*moved(tuple(arguments), torch.device("meta")), **options)


@contextmanager
def fake_arguments(name: str, device: str) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Arguments of a public function on a device that need not be there."""
    arguments, options = make(name)
    mode = FakeTensorMode()

    def place(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(place, value))
        return FakeTensor(mode, value.to("meta"), torch.device(device)) if isinstance(value, Tensor) else value

    arguments = list(map(place, arguments))
    with mode:
        yield arguments, options


@pytest.fixture
def no_known_devices() -> Iterator[None]:
    compute_capability.cache_clear()
    yield
    compute_capability.cache_clear()


@pytest.mark.usefixtures("no_known_devices")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("device", "capability", "hip", "got"),
    [
        ("cuda:0", (7, 5), None, "cuda:0 of compute capability 7.5"),
        ("cuda:1", (6, 1), None, "cuda:1 of compute capability 6.1"),
        ("cuda:0", (9, 4), "6.4.1", "cuda:0 of ROCm 6.4.1"),
        ("xpu:0", None, None, "xpu:0"),
        ("mps:0", None, None, "mps:0"),
    ],
    ids=["sm_75", "sm_61", "rocm", "xpu", "mps"],
)
def test_other_gpus_are_refused(
    name: str, device: str, capability: Any, hip: str | None, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argument = "q" if name in ("attention", "qk_norm_rope") else "x"
    with fake_arguments(name, device) as (arguments, options):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        want = f"{argument}: got device {got}, want an NVIDIA GPU of compute capability 8.0 or later"
        with pytest.raises(ValueError, match=f"^{re.escape(want)}$"):
            getattr(cogvid_kernels, name)(*arguments, **options)


@pytest.mark.usefixtures("no_known_devices")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_gpus_from_sm_80_on_are_taken(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_arguments("rms_norm", "cuda:0") as (arguments, options):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        out = cogvid_kernels.rms_norm(*arguments, **options)
    assert out.device == torch.device("cuda:0")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_the_reference(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """fp32: against fp64. Low precision: no worse than the reference in the same dtype, beside fp64."""
    arguments, options = make(name)
    arguments = [a.to(device, dtype) for a in arguments]
    grads = {}
    for owner, wide in ((cogvid_kernels, dtype), (ops, dtype), (ops, torch.float64)):
        leaves = [a.to(wide).detach().requires_grad_() for a in arguments]
        out = getattr(owner, name)(*leaves, **options)
        out.backward(randn(*out.shape, seed=20).to(device, dtype).to(wide))
        grads[owner, wide] = [leaf.grad for leaf in leaves]
    for ours, theirs, exact in zip(*grads.values(), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == exact.shape
        error = rel_rms(ours, exact)
        if dtype == torch.float32:
            assert error <= tolerances.KERNEL_FP32, error
        else:
            assert error <= tolerances.KERNEL_LOW_PRECISION * rel_rms(theirs, exact)


def test_gradients_of_weights_in_another_dtype(device: torch.device) -> None:
    x, y, gate = (t.to(device) for t in make("gate_residual")[0])
    leaves = [x.bfloat16(), y.bfloat16(), gate]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    cogvid_kernels.gate_residual(*leaves, text_len=4).float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.bfloat16, torch.float32]
    want = torch.stack([leaves[1][:, :4].float().sum(1), leaves[1][:, 4:].float().sum(1)], dim=1)
    assert rel_rms(leaves[2].grad, want) <= tolerances.KERNEL_FP32


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DIFFERENTIABLE])
def test_a_backward_pass_that_does_not_exist_says_so(name: str, device: torch.device) -> None:
    arguments, options = make(name)
    arguments = list(moved(tuple(arguments), device))
    arguments[0] = arguments[0].requires_grad_()
    out = results(getattr(cogvid_kernels, name)(*arguments, **options))  # a forward under grad mode is fine
    assert all(o.requires_grad for o in out)
    with pytest.raises(RuntimeError, match=f'^{name}: got a backward pass, want forward only; train with ops="torch"$'):
        sum(o.sum() for o in out).backward()


def tiny(device: torch.device) -> tuple[Transformer, tuple[Tensor, ...]]:
    config = TransformerConfig(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4, out_channels=4, text_embed_dim=12,
        time_embed_dim=8, max_text_seq_length=3, sample_frames=9, sample_height=4, sample_width=6,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config, Ops.triton()).to(device)
    inputs = randn(1, 4, 2, 4, 6).to(device), randn(1, 3, 12).to(device), torch.tensor([500], device=device)
    return model, inputs


def test_training_a_model_on_the_kernels_is_refused(device: torch.device) -> None:
    model, inputs = tiny(device)
    loss = model(*inputs).square().mean()
    with pytest.raises(RuntimeError, match=r'got a backward pass, want forward only; train with ops="torch"$'):
        loss.backward()


@pytest.mark.slow
def test_compile_without_a_graph_break(device: torch.device) -> None:
    model, inputs = tiny(device)
    model.requires_grad_(False)
    want = model(*inputs)
    torch._dynamo.reset()
    compile_modules(model.blocks, "aot_eager")
    assert rel_rms(model(*inputs), want) <= tolerances.KERNEL_FP32


def test_export(device: torch.device) -> None:
    model, inputs = tiny(device)
    program = torch.export.export(model.requires_grad_(False), inputs)
    targets = {str(node.target) for node in program.graph.nodes if "cogvid_kernels" in str(node.target)}
    used = ("attention", "qk_norm_rope", "layer_norm_modulate", "gate_residual", "gate_residual_norm_modulate")
    assert targets == {f"cogvid_kernels.{name}.default" for name in (*used, "linear_gelu")}
    assert rel_rms(program.module()(*inputs), model(*inputs)) <= tolerances.KERNEL_FP32


def test_the_norms_of_the_decoder_compile_and_export(device: torch.device) -> None:
    class Norms(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            x = cogvid_kernels.group_norm_silu(x, weight, bias, num_groups=4, eps=1e-6)
            return cogvid_kernels.spatial_norm_silu(x, weight, bias, scale, shift, num_groups=4, eps=1e-6)

    arguments = moved(tuple(make("spatial_norm_silu")[0]), device)
    want = Norms()(*arguments)
    torch._dynamo.reset()
    for run in (
        torch.compile(Norms(), fullgraph=True, backend="aot_eager"),
        torch.export.export(Norms(), arguments).module(),
    ):
        assert torch.equal(run(*arguments), want)

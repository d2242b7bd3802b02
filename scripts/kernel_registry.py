"""What `bench_kernels.py` times: of each op its inputs, its work, and everybody's implementation of it.

Inputs are what the models really pass: LayerNormed q and k, projections as they left their linears, channels-last
activations.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvid import ops

TEXT_LEN = 226
ZQ_CHANNELS = 16

# A call, and what turns its result into what the reference returns (not timed).
Runner = tuple[Callable[[], Any], Callable[[Any], Any]]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One shape of one op. `inputs` makes the arguments of `cogvid.ops`; `work` is FLOP or bytes, by the op's unit."""

    label: str
    work: float
    inputs: Callable[[torch.device, torch.dtype], Inputs]


@dataclass(frozen=True)
class Op:
    """An entry of the registry.

    Attributes:
        unit: "flop" or "byte": what `work` of its cases counts and which limit applies.
        formula: how `work` is counted, for --help.
        cases: from the size's name and whether to sweep.
        providers: besides those of every op: name -> from the inputs to a runner; it may raise, which is reported.
        variants: name -> further arguments of our kernel.
    """

    name: str
    unit: str
    formula: str
    cases: Callable[[str, bool, torch.dtype], list[Case]]
    reference: Callable[..., Any]
    ours: Callable[..., Any]
    providers: dict[str, Callable[[Inputs], Runner]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


def find_providers(op: Op, compiled: bool) -> dict[str, Callable[[Inputs], Runner]]:
    """List the op's providers: the plain op, the compiler, others' code, ours in every variant.

    compiled: run what goes through torch.compile; otherwise it says why it is not run.
    """

    def plain(inputs: Inputs) -> Runner:
        return functools.partial(op.reference, **public(inputs)), same

    def through_compiler(inputs: Inputs) -> Runner:
        if not compiled:
            raise RuntimeError("needs --compile")
        function = torch.compile(op.reference, dynamic=False, mode="max-autotune-no-cudagraphs")
        return functools.partial(function, **public(inputs)), same

    def ours(inputs: Inputs, **options: Any) -> Runner:
        return functools.partial(op.ours, **public(inputs), **options), same

    found: dict[str, Callable[[Inputs], Runner]] = {"torch": plain, "torch.compile": through_compiler}
    for name, build in op.providers.items():
        found[name] = build if compiled or "compiled" not in name else through_compiler  # which says why not
    found["ours"] = ours
    for name, options in op.variants.items():
        found[f"ours/{name}"] = functools.partial(ours, **options)
    return found


def without_untried(op: Op, asked: str) -> Op:
    """Leave out variants whose warps wait for each other and which are no default yet, unless asked for by name.

    A fault in such a kernel does not raise; it hangs. `gpu_session.py` tries them in a process of their own.
    """
    from cogvid_kernels._tiles import ATTENTION_ORDER
    from cogvid_kernels.attention import VARIANTS

    if op.name != "attention":
        return op
    tried = {name for order in ATTENTION_ORDER.values() for name in order} | {asked}
    kept = {n: options for n, options in op.variants.items() if VARIANTS[n].schedule != "ws" or n in tried}
    for name in op.variants.keys() - kept.keys():
        print(f"ours/{name}: left out, it has not run on a GPU yet; --providers {name} runs it")
    return replace(op, variants=kept)


def public(inputs: Inputs) -> Inputs:
    """Return the inputs that are the op's arguments; the others serve providers that compute more themselves."""
    return {name: value for name, value in inputs.items() if not name.startswith("_")}


def same(value: Any) -> Any:
    return value


class FixedOutput(nn.Module):
    """Stands in for a linear whose output is prepared, so that a module is timed without it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
        return self.value


def sdpa(backend: str) -> Callable[[Inputs], Runner]:
    def build(inputs: Inputs) -> Runner:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")

        def run() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v)

        return run, lambda out: out.transpose(1, 2).flatten(2)

    return build


def flex_attention(inputs: Inputs) -> Runner:
    from torch.nn.attention.flex_attention import flex_attention as flex

    function = torch.compile(flex, dynamic=False)
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    return lambda: function(q, k, v), lambda out: out.transpose(1, 2).flatten(2)


def foreign_attention(module: str, name: str, **options: Any) -> Callable[[Inputs], Runner]:
    """Call a package's function on [B, N, H, hd]; some return the log-sum-exp too."""

    def build(inputs: Inputs) -> Runner:
        function = getattr(importlib.import_module(module), name)
        run = functools.partial(function, inputs["q"], inputs["k"], inputs["v"], **options)
        return run, lambda out: (out[0] if isinstance(out, tuple) else out).flatten(2)

    return build


def diffusers_processor(inputs: Inputs) -> Runner:
    """Run diffusers' processor: norm, rotation and attention, its linears stubbed."""
    module, x = diffusers_attention(inputs), inputs["v"].flatten(2)
    module.to_v = FixedOutput(x)
    text, video = x[:, : inputs["text_len"]], x[:, inputs["text_len"] :]
    rope = diffusers_rope(inputs)
    return lambda: module(video, text, image_rotary_emb=rope), lambda out: torch.cat([out[1], out[0]], dim=1)


def diffusers_attention(inputs: Inputs) -> Any:
    from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0

    heads, head_dim = inputs["q"].shape[2:]
    processor: Any = CogVideoXAttnProcessor2_0()  # its own annotation names another class
    with torch.device("meta"):
        module: Any = Attention(
            query_dim=heads * head_dim,
            dim_head=head_dim,
            heads=heads,
            qk_norm="layer_norm",
            eps=inputs["eps"],
            processor=processor,
        )
    module.to_q, module.to_k = (FixedOutput(inputs[name].flatten(2)) for name in "qk")
    module.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    for norm, name in ((module.norm_q, "q"), (module.norm_k, "k")):
        set_affine(norm, inputs[f"{name}_weight"], inputs[f"{name}_bias"])
    return module


def diffusers_rope(inputs: Inputs) -> Any:
    """Return the table as diffusers has it: each angle twice."""
    if inputs["rope"] is None:
        return None
    cos, sin = (table.repeat_interleave(2, dim=1) for table in inputs["rope"])
    return cos, sin


def diffusers_qk_norm_rope(inputs: Inputs) -> Runner:
    """Run the lines of diffusers' processor between its linears and its attention, by its own modules."""
    from diffusers.models.embeddings import apply_rotary_emb

    module, rope, text_len = diffusers_attention(inputs), diffusers_rope(inputs), inputs["text_len"]
    heads = inputs["q"].shape[2]

    def run() -> list[Tensor]:
        out = []
        for linear, norm in ((module.to_q, module.norm_q), (module.to_k, module.norm_k)):
            x = norm(linear(None).unflatten(-1, (heads, -1)).transpose(1, 2))
            if rope is not None:
                x[:, :, text_len:] = apply_rotary_emb(x[:, :, text_len:], rope)
            out.append(x)
        return out

    return run, lambda out: [x.transpose(1, 2) for x in out]


def torch_centred_norm(inputs: Inputs) -> Runner:
    return functools.partial(ops.qk_norm_rope, **public(inputs), centred=True), same


def set_affine(norm: Any, weight: Tensor, bias: Tensor) -> None:
    norm.weight, norm.bias = (nn.Parameter(t.detach(), requires_grad=False) for t in (weight, bias))


def diffusers_layer_norm_zero(inputs: Inputs) -> tuple[Any, Tensor, Tensor]:
    """Return diffusers' adaLN with its linear stubbed, and the two gates."""
    from diffusers.models.normalization import CogVideoXLayerNormZero

    with torch.device("meta"):
        module: Any = CogVideoXLayerNormZero(8, inputs["x"].shape[-1], eps=inputs["eps"])
    shift, scale = inputs["shift"], inputs["scale"]
    gate = inputs.get("gate", torch.zeros_like(shift))
    module.linear = FixedOutput(torch.cat([t[:, row] for row in (1, 0) for t in (shift, scale, gate)], dim=1))
    module.silu = nn.Identity()
    set_affine(module.norm, inputs["weight"], inputs["bias"])
    return module, gate[:, 1:], gate[:, :1]


def diffusers_layer_norm_modulate(inputs: Inputs) -> Runner:
    module, _, _ = diffusers_layer_norm_zero(inputs)
    text, video = split_streams(inputs["x"], inputs["text_len"])
    return lambda: module(video, text, video), lambda out: torch.cat([out[1], out[0]], dim=1)


def diffusers_gate_residual_norm_modulate(inputs: Inputs) -> Runner:
    module, gate, text_gate = diffusers_layer_norm_zero(inputs)
    (text, video), (text_y, video_y) = (split_streams(inputs[name], inputs["text_len"]) for name in "xy")

    def run() -> tuple[Tensor, ...]:
        new_video, new_text = video + gate * video_y, text + text_gate * text_y
        return new_text, new_video, *module(new_video, new_text, new_video)[:2]

    return run, lambda out: [torch.cat([out[0], out[1]], dim=1), torch.cat([out[3], out[2]], dim=1)]


def split_streams(x: Tensor, text_len: int) -> tuple[Tensor, Tensor]:
    """Return text and video each in its own memory, as diffusers keeps them."""
    return x[:, :text_len].contiguous(), x[:, text_len:].contiguous()


def diffusers_gelu(inputs: Inputs) -> Runner:
    from diffusers.models.activations import GELU

    with torch.device("meta"):
        module: Any = GELU(inputs["x"].shape[-1], inputs["weight"].shape[0], approximate="tanh")
    set_affine(module.proj, inputs["weight"], inputs["bias"])
    return lambda: module(inputs["x"]), same


def transformers_rms_norm(inputs: Inputs) -> Runner:
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    module: Any = T5LayerNorm(inputs["x"].shape[-1], eps=inputs["eps"])
    module.weight = nn.Parameter(inputs["weight"], requires_grad=False)
    return lambda: module(inputs["x"]), same


def native_group_norm(inputs: Inputs) -> Runner:
    """Run what diffusers runs in the encoder: PyTorch's GroupNorm, then SiLU."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: F.silu(F.group_norm(x, inputs["num_groups"], weight, bias, inputs["eps"])), same


def diffusers_spatial_norm(inputs: Inputs) -> Runner:
    """Run diffusers' spatial norm, which upsamples the latents and convolves them at full size, and SiLU."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

    with torch.device("meta"):
        module: Any = CogVideoXSpatialNorm3D(inputs["x"].shape[1], ZQ_CHANNELS, inputs["num_groups"])
    set_affine(module.norm_layer, inputs["weight"], inputs["bias"])
    for name in ("conv_y", "conv_b"):
        conv = getattr(module, name).conv
        set_affine(conv, inputs[f"_{name}_weight"], inputs[f"_{name}_bias"])
    return lambda: F.silu(module(inputs["x"], inputs["_z"])[0]), same


def randn(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).mul_(scale)


def affine(width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = randn(width, device=device, dtype=dtype, scale=0.1).add_(1)
    return weight, randn(width, device=device, dtype=dtype, scale=0.1)


def transformer_shapes(size: str, sweep: bool) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield name, batch, tokens, heads and text tokens."""
    if size == "toy":
        yield "toy", 1, 67, 2, 16
        if sweep:
            yield "sweep", 1, 35, 2, 16
        return
    yield "2B", 2, 17776, 30, TEXT_LEN
    yield "5B", 2, 17776, 48, TEXT_LEN
    yield "1.5", 2, 45106, 48, TEXT_LEN
    if sweep:
        for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
            yield "sweep", 2, tokens, 48, TEXT_LEN


def attention_cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:  # noqa: ARG001
    def inputs(batch: int, tokens: int, heads: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        # LayerNormed q and k with a gain, as a real spread of logits: zeros or tiny values change power and clocks.
        q, k, v = (randn(batch, tokens, heads, 64, device=device, dtype=dtype) for _ in range(3))
        q, k = (F.layer_norm(x, (64,)) * 1.3 for x in (q, k))
        return {"q": q, "k": k, "v": v}

    return [
        Case(
            f"{name} B{batch} H{heads} N{tokens} hd64",
            4.0 * batch * heads * tokens**2 * 64,
            functools.partial(inputs, batch, tokens, heads),
        )
        for name, batch, tokens, heads, _ in transformer_shapes(size, sweep)
    ]


def projected_inputs(
    names: str,
    batch: int,
    tokens: int,
    heads: int,
    text_len: int,
    rotate: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Inputs:
    made = {name: randn(batch, tokens, heads, 64, device=device, dtype=dtype) for name in names}
    for name in "qk":  # centred, so that the form without the mean computes the same
        made[name] -= made[name].mean(-1, keepdim=True)
    (q_weight, q_bias), (k_weight, k_bias) = affine(64, device, dtype), affine(64, device, dtype)
    angle = torch.rand(tokens - text_len, 32, device=device) * 6.28
    made |= {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    rope = (angle.cos(), angle.sin()) if rotate else None
    return {**made, "rope": rope, "text_len": text_len, "eps": 1e-6}


def projected_cases(names: str, work: Callable[..., float]) -> Callable[[str, bool, torch.dtype], list[Case]]:
    def cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:
        return [
            Case(
                f"{name} B{batch} H{heads} N{tokens} hd64{' no rope' if name == '2B' else ''}",
                work(batch, tokens, heads, dtype.itemsize),
                functools.partial(projected_inputs, names, batch, tokens, heads, text_len, name != "2B"),
            )
            for name, batch, tokens, heads, text_len in transformer_shapes(size, sweep)
        ]

    return cases


def token_cases(passes: int, *names: str) -> Callable[[str, bool, torch.dtype], list[Case]]:
    """Build cases of the ops between the linears; `passes` tensors of all tokens are read or written."""

    def inputs(batch: int, tokens: int, width: int, text_len: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        weight, bias = affine(width, device, dtype)
        shift, scale, gate = randn(batch, 2, 3, width, device=device, dtype=dtype).unbind(2)
        made = {
            "x": randn(batch, tokens, width, device=device, dtype=dtype),
            "y": randn(batch, tokens, width, device=device, dtype=dtype),
            "gate": gate, "weight": weight, "bias": bias, "shift": shift, "scale": scale,
            "text_len": text_len, "eps": 1e-5,
        }  # fmt: skip
        return {name: made[name] for name in (*names, "text_len")}

    def cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:
        return [
            Case(
                f"{name} {batch * tokens}x{heads * 64}",
                float(passes) * batch * tokens * heads * 64 * dtype.itemsize,
                functools.partial(inputs, batch, tokens, heads * 64, text_len),
            )
            for name, batch, tokens, heads, text_len in transformer_shapes(size, sweep)
        ]

    return cases


def rms_norm_cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:  # noqa: ARG001
    shapes = [(7, 200), (12, 64)] if size == "toy" else [(226, 4096), (35552, 3072), (90212, 3072), (35552, 1920)]

    def inputs(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        x = randn(rows, width, device=device, dtype=dtype)
        return {"x": x, "weight": affine(width, device, dtype)[0], "eps": 1e-6}

    return [
        Case(f"{rows}x{width}", 2.0 * rows * width * dtype.itemsize, functools.partial(inputs, rows, width))
        for rows, width in shapes
    ]


def linear_gelu_cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:  # noqa: ARG001
    def inputs(batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        weight = randn(4 * width, width, device=device, dtype=dtype, scale=width**-0.5)
        bias = affine(4 * width, device, dtype)[1]
        return {"x": randn(batch, tokens, width, device=device, dtype=dtype), "weight": weight, "bias": bias}

    return [
        Case(
            f"{name} {batch * tokens}x{heads * 64}x{heads * 256}",
            2.0 * batch * tokens * heads * 64 * heads * 256,
            functools.partial(inputs, batch, tokens, heads * 64),
        )
        for name, batch, tokens, heads, _ in transformer_shapes(size, sweep)
    ]


def vae_cases(spatial: bool) -> Callable[[str, bool, torch.dtype], list[Case]]:
    """Build the decoder's activations of a first chunk (three latent frames): its widest stage, and its largest."""

    def inputs(
        shape: tuple[int, int, int, int], latent: tuple[int, int, int], device: torch.device, dtype: torch.dtype
    ) -> Inputs:
        channels = shape[0]
        x = torch.randn(1, *shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        weight, bias = affine(channels, device, dtype)
        made: Inputs = {"x": x, "weight": weight, "bias": bias, "num_groups": min(32, channels // 4), "eps": 1e-6}
        if spatial:
            z = made["_z"] = torch.randn(1, ZQ_CHANNELS, *latent, device=device, dtype=dtype)
            for argument, name in (("scale", "conv_y"), ("shift", "conv_b")):
                kernel = randn(channels, ZQ_CHANNELS, device=device, dtype=dtype, scale=0.25)
                offset = affine(channels, device, dtype)[0]
                made |= {f"_{name}_weight": kernel[..., None, None, None], f"_{name}_bias": offset}
                made[argument] = F.linear(z.movedim(1, -1), kernel, offset).movedim(-1, 1)
        return made

    def cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:  # noqa: ARG001
        shapes = (
            [("toy", (8, 5, 8, 12), (2, 2, 3))]
            if size == "toy"
            else [
                ("49 frames", (512, 3, 60, 90), (3, 60, 90)),
                ("49 frames", (128, 9, 480, 720), (3, 60, 90)),
                ("81 frames", (512, 3, 96, 170), (3, 96, 170)),
                ("81 frames", (256, 9, 768, 1360), (3, 96, 170)),  # passes 2**31 elements
            ]
        )
        return [
            Case(
                f"{name} {'x'.join(map(str, shape))}",
                3.0 * torch.Size(shape).numel() * dtype.itemsize,
                functools.partial(inputs, shape, latent),
            )
            for name, shape, latent in shapes
        ]

    return cases


def make_registry() -> list[Op]:
    """Return every operation with its cases, its reference, our kernel and the other providers."""
    return [*attention_ops(), *token_ops(), *vae_ops()]


def attention_ops() -> list[Op]:
    import cogvid_kernels
    from cogvid_kernels.attention import VARIANTS, Variant

    def torch_norm_rope_attention(v: Tensor, **inputs: Any) -> Any:
        q, k = ops.qk_norm_rope(**inputs)
        return ops.attention(q, k, v)

    def our_norm_rope_attention(v: Tensor, bounded: bool = False, **inputs: Any) -> Any:
        q, k = cogvid_kernels.qk_norm_rope(**inputs)
        tma = q.device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 9
        variant = Variant("tma" if tma else "pointer", bounded=True).name if bounded else None
        return cogvid_kernels.attention(q, k, v, variant=variant)

    backends = {
        f"SDPA {name}": sdpa(f"{name}_ATTENTION" if name in ("FLASH", "CUDNN", "EFFICIENT") else name)
        for name in ("FLASH", "CUDNN", "EFFICIENT", "MATH")
    }
    flops = "4 B H N^2 hd"
    return [
        Op(
            "attention", "flop", flops, attention_cases, ops.attention, cogvid_kernels.attention,
            {
                **backends,
                "FlexAttention compiled": flex_attention,
                "FlashAttention 4": foreign_attention("flash_attn.cute", "flash_attn_func"),
                "FlashAttention 3": foreign_attention("flash_attn_interface", "flash_attn_func"),
                "FlashAttention 2": foreign_attention("flash_attn", "flash_attn_func"),
                "SageAttention 8-bit": foreign_attention("sageattention", "sageattn", tensor_layout="NHD"),
            },
            {name: {"variant": name} for name in VARIANTS},
        ),
        Op(
            "norm_rope_attention", "flop", flops,
            projected_cases("qkv", lambda batch, tokens, heads, _: 4.0 * batch * heads * tokens**2 * 64),
            torch_norm_rope_attention, our_norm_rope_attention, {"diffusers": diffusers_processor},
            {"bounded": {"bounded": True}},
        ),
        Op(
            "qk_norm_rope", "byte", "4 B N H hd elements (q and k read and written)",
            projected_cases("qk", lambda batch, tokens, heads, size: 4.0 * batch * tokens * heads * 64 * size),
            ops.qk_norm_rope, cogvid_kernels.qk_norm_rope,
            {"diffusers": diffusers_qk_norm_rope, "torch centred": torch_centred_norm},
            {"centred": {"centred": True}},
        ),
    ]  # fmt: skip


def token_ops() -> list[Op]:
    import cogvid_kernels
    from cogvid_kernels.linear_gelu import VARIANTS

    norms = ("x", "weight", "bias", "shift", "scale", "eps")
    return [
        Op(
            "layer_norm_modulate", "byte", "2 B N D elements", token_cases(2, *norms),
            ops.layer_norm_modulate, cogvid_kernels.layer_norm_modulate, {"diffusers": diffusers_layer_norm_modulate},
        ),
        Op(
            "gate_residual", "byte", "3 B N D elements", token_cases(3, "x", "y", "gate"),
            ops.gate_residual, cogvid_kernels.gate_residual,
        ),
        Op(
            "gate_residual_norm_modulate", "byte", "4 B N D elements", token_cases(4, "y", "gate", *norms),
            ops.gate_residual_norm_modulate, cogvid_kernels.gate_residual_norm_modulate,
            {"diffusers": diffusers_gate_residual_norm_modulate},
        ),
        Op(
            "rms_norm", "byte", "2 rows D elements", rms_norm_cases, ops.rms_norm, cogvid_kernels.rms_norm,
            {"transformers": transformers_rms_norm},
        ),
        Op(
            "linear_gelu", "flop", "2 B N D 4D", linear_gelu_cases, ops.linear_gelu, cogvid_kernels.linear_gelu,
            {"diffusers": diffusers_gelu}, {name: {"variant": name} for name in VARIANTS},
        ),
    ]  # fmt: skip


def vae_ops() -> list[Op]:
    import cogvid_kernels

    return [
        Op(
            "group_norm_silu", "byte", "3 B C T H W elements (read twice)", vae_cases(spatial=False),
            ops.group_norm_silu, cogvid_kernels.group_norm_silu, {"native group_norm, silu": native_group_norm},
        ),
        Op(
            "spatial_norm_silu", "byte", "3 B C T H W elements (read twice)", vae_cases(spatial=True),
            ops.spatial_norm_silu, cogvid_kernels.spatial_norm_silu, {"diffusers": diffusers_spatial_norm},
        ),
    ]  # fmt: skip

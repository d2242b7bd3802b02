"""What is timed: of each op its shapes, its work, and everybody's implementation of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cogvid import ops
from cogvid_kernels.bench import cases
from cogvid_kernels.bench.cases import Case, Inputs, Shapes
from cogvid_kernels.bench.providers import (
    Runner,
    diffusers_gate_residual_norm_modulate,
    diffusers_gelu,
    diffusers_layer_norm_modulate,
    diffusers_processor,
    diffusers_qk_norm_rope,
    diffusers_spatial_norm,
    flex_attention,
    foreign_attention,
    native_group_norm,
    public,
    same,
    sdpa,
    torch_centred_norm,
    transformers_rms_norm,
)


@dataclass(frozen=True)
class Op:
    """An entry of the registry.

    Attributes:
        unit: "flop" or "byte": which limit the op meets at the models' shapes.
        formula: FLOP and bytes of a case, for --help.
        shapes: those that are timed and those that `--shape` may name.
        providers: besides those of every op: name -> from the inputs to a runner; it may raise, which is reported.
        variants: name -> further arguments of our kernel.
    """

    name: str
    unit: str
    formula: str
    shapes: Shapes
    reference: Callable[..., Any]
    ours: Callable[..., Any]
    providers: dict[str, Callable[[Inputs], Runner]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cases(self, size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:
        """Return what is timed unless a shape is given. size: "full" or "toy"; sweep: a range of lengths too."""
        return self.shapes.cases(size, sweep, dtype)


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


def make_registry() -> list[Op]:
    """Return every operation with its shapes, its reference, our kernel and the other providers."""
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
    tokens = cases.tokens_of
    return [
        Op(
            "attention", "flop", "4 B H N^2 hd flop, 4 B N H hd elements", tokens(cases.attention_case),
            ops.attention, cogvid_kernels.attention,
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
            "norm_rope_attention", "flop", "4 B H N^2 hd flop, 4 B N H hd elements",
            tokens(cases.projected_case, "qkv", lambda elements, length: (4 * elements * length, 4 * elements)),
            torch_norm_rope_attention, our_norm_rope_attention, {"diffusers": diffusers_processor},
            {"bounded": {"bounded": True}},
        ),
        Op(
            "qk_norm_rope", "byte", "22 B N H hd flop, 4 B N H hd elements (q and k read and written)",
            tokens(cases.projected_case, "qk", lambda elements, _: (22 * elements, 4 * elements)),
            ops.qk_norm_rope, cogvid_kernels.qk_norm_rope,
            {"diffusers": diffusers_qk_norm_rope, "torch centred": torch_centred_norm},
            {"centred": {"centred": True}},
        ),
    ]  # fmt: skip


def token_ops() -> list[Op]:
    import cogvid_kernels
    from cogvid_kernels.linear_gelu import VARIANTS

    norms = ("x", "weight", "bias", "shift", "scale", "eps")
    tokens = cases.tokens_of
    return [
        Op(
            "layer_norm_modulate", "byte", "8 B N D flop, 2 B N D elements", tokens(cases.token_case, 8, 2, norms),
            ops.layer_norm_modulate, cogvid_kernels.layer_norm_modulate, {"diffusers": diffusers_layer_norm_modulate},
        ),
        Op(
            "gate_residual", "byte", "2 B N D flop, 3 B N D elements",
            tokens(cases.token_case, 2, 3, ("x", "y", "gate")), ops.gate_residual, cogvid_kernels.gate_residual,
        ),
        Op(
            "gate_residual_norm_modulate", "byte", "10 B N D flop, 4 B N D elements",
            tokens(cases.token_case, 10, 4, ("y", "gate", *norms)),
            ops.gate_residual_norm_modulate, cogvid_kernels.gate_residual_norm_modulate,
            {"diffusers": diffusers_gate_residual_norm_modulate},
        ),
        Op(
            "rms_norm", "byte", "4 rows D flop, 2 rows D elements", cases.ROWS, ops.rms_norm, cogvid_kernels.rms_norm,
            {"transformers": transformers_rms_norm},
        ),
        Op(
            "linear_gelu", "flop", "8 B N D^2 flop, 5 B N D + 4 D^2 elements", tokens(cases.linear_gelu_case),
            ops.linear_gelu, cogvid_kernels.linear_gelu, {"diffusers": diffusers_gelu},
            {name: {"variant": name} for name in VARIANTS},
        ),
    ]  # fmt: skip


def vae_ops() -> list[Op]:
    import cogvid_kernels

    read = "3 B C T H W elements (read twice)"
    return [
        Op(
            "group_norm_silu", "byte", f"12 B C T H W flop, {read}", cases.activations_of(spatial=False),
            ops.group_norm_silu, cogvid_kernels.group_norm_silu, {"native group_norm, silu": native_group_norm},
        ),
        Op(
            "spatial_norm_silu", "byte", f"14 B C T H W flop, {read}", cases.activations_of(spatial=True),
            ops.spatial_norm_silu, cogvid_kernels.spatial_norm_silu, {"diffusers": diffusers_spatial_norm},
        ),
    ]  # fmt: skip

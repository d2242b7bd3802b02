"""The code of others that computes an operation: PyTorch's backends, other packages' kernels, diffusers, transformers.

Each function takes the inputs of a case and returns a runner. It may raise, for example because its package is not
installed; the benchmark reports that.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvid import ops
from cogvid_kernels.bench.cases import ZQ_CHANNELS, Inputs

# A call, and what turns its result into what the reference returns (not timed).
Runner = tuple[Callable[[], Any], Callable[[Any], Any]]


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

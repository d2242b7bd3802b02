"""Adapters, hooks and replaced modules take effect wherever they are put; a fused operation runs only where none is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvid.config import TransformerConfig
from cogvid.models.transformer import Transformer
from cogvid.ops import Ops, can_fuse
from measure import rel_rms
from references import perturb
from tests.checkpoints import TRANSFORMER
from tests.tolerances import UNFUSED_FP32

CONFIGS = {
    "added": dataclasses.replace(TRANSFORMER, use_rotary_positional_embeddings=False, attention_head_dim=32),
    "rotary": TRANSFORMER,
    "learned": dataclasses.replace(TRANSFORMER, in_channels=32, use_learned_positional_embeddings=True),
    "1.5": dataclasses.replace(TRANSFORMER, in_channels=32, patch_size_t=2, ofs_embed_dim=32),
}
FUSED = ("layer_norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "linear_gelu")


def make(config: TransformerConfig = TRANSFORMER, ops: Ops | None = None) -> Transformer:
    torch.manual_seed(0)
    return perturb(Transformer(config, ops)).eval().requires_grad_(False)


def inputs(config: TransformerConfig = TRANSFORMER) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.in_channels, 4, 8, 12, generator=generator)
    text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    return latents, text, torch.tensor([999, 137])


def counting(calls: list[str]) -> Ops:
    """Return the plain operations, with those that take a module's weights noting their name."""

    def noting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(Ops.torch(), name)(*args, **kwargs)

        return call

    return dataclasses.replace(Ops.torch(), **{name: noting(name) for name in FUSED})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_hook_on_every_leaf_fires(name: str) -> None:
    model, args = make(CONFIGS[name]), inputs(CONFIGS[name])
    plain, fired = model(*args), []
    leaves = {path for path, module in model.named_modules() if not list(module.children())}
    for path in leaves:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: fired.append(path))
    hooked = model(*args)
    assert set(fired) == leaves
    assert len(fired) == len(leaves)
    assert rel_rms(hooked, plain) < UNFUSED_FP32


@pytest.mark.parametrize("leaf", ["norm1", "norm2", "q_norm", "k_norm", "q_proj", "out", "mlp_in", "mlp_out"])
def test_what_a_hook_returns_is_used(leaf: str) -> None:
    model, args = make(), inputs()
    plain = model(*args)
    model.blocks[1].get_submodule(leaf).register_forward_hook(lambda _m, _i, out: 0 * out)
    assert rel_rms(model(*args), plain) > 1e-3


def test_the_hook_sees_what_a_linear_returns() -> None:
    """The output of `mlp_in` is the pre-activation: half of its values are negative."""
    model, seen = make(), []
    model.blocks[0].mlp_in.register_forward_hook(lambda _m, x, out: seen.append((x[0], out)))
    model(*inputs())
    [(x, out)] = seen
    torch.testing.assert_close(out, nn.functional.linear(x, model.blocks[0].mlp_in.weight, model.blocks[0].mlp_in.bias))
    assert (out < 0).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_on_every_linear_equals_the_merged_weights(name: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")

    config = CONFIGS[name]
    model, merged, args = make(config), make(config), inputs(config)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=linears), model)
    generator = torch.Generator().manual_seed(2)
    for path in linears:
        wrapper = model.get_submodule(path)
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        with torch.no_grad():
            for factor in (a, b):
                factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))
            merged.get_submodule(path).weight += wrapper.scaling["default"] * b @ a
    expected = merged(*args)
    assert rel_rms(model(*args), expected) < 1e-5
    assert rel_rms(make(config)(*args), expected) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_cpu_offload_runs(name: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    model, args = make(CONFIGS[name]), inputs(CONFIGS[name])
    plain = model(*args)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert rel_rms(model(*args), plain) < UNFUSED_FP32


class Doubled(nn.Linear):
    """A linear of a class of its own, as quantised ones are."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("leaf", ["q_proj", "mlp_in", "mlp_out", "modulation1"])
def test_a_replaced_linear_is_called(leaf: str) -> None:
    model, expected, args = make(), make(), inputs()
    linear = model.blocks[0].get_submodule(leaf)
    replacement = Doubled(linear.in_features, linear.out_features)
    replacement.load_state_dict(linear.state_dict())
    setattr(model.blocks[0], leaf, replacement)
    with torch.no_grad():
        for parameter in expected.blocks[0].get_submodule(leaf).parameters():
            parameter *= 2
    assert rel_rms(model(*args), expected(*args)) < UNFUSED_FP32


def test_operations_are_fused_only_where_modules_are_plain() -> None:
    calls: list[str] = []
    model, args = make(ops=counting(calls)), inputs()
    model(*args)
    each_block = ["layer_norm_modulate", "qk_norm_rope", "gate_residual_norm_modulate", "linear_gelu"]
    assert calls == [*each_block, *each_block, "layer_norm_modulate"]
    calls.clear()
    handle = model.blocks[0].q_norm.register_forward_hook(lambda *_: None)
    model.blocks[1].mlp_in.register_forward_pre_hook(lambda *_: None)
    model(*args)
    first, second = [name for name in each_block if name != "qk_norm_rope"], each_block[:-1]
    assert calls == [*first, *second, "layer_norm_modulate"]
    handle.remove()
    calls.clear()
    model(*args)
    assert calls == [*each_block, *second, "layer_norm_modulate"]


def test_can_fuse() -> None:
    assert can_fuse(nn.Linear(2, 3), nn.Linear)
    assert can_fuse(nn.LayerNorm(2), nn.LayerNorm)
    assert not can_fuse(nn.Linear(2, 3, bias=False), nn.Linear)
    assert not can_fuse(nn.LayerNorm(2, elementwise_affine=False), nn.LayerNorm)
    assert not can_fuse(Doubled(2, 3), nn.Linear)
    assert not can_fuse(nn.LayerNorm(2), nn.Linear)
    assert not can_fuse(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear)
    patched = nn.Linear(2, 3)
    patched.forward = lambda x: x
    assert not can_fuse(patched, nn.Linear)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        hooked = nn.Linear(2, 3)
        handle = getattr(hooked, register)(lambda *_: None)
        assert not can_fuse(hooked, nn.Linear)
        handle.remove()
        assert can_fuse(hooked, nn.Linear)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not can_fuse(nn.Linear(2, 3), nn.Linear)
    handle.remove()

    class Quantised(Tensor):
        pass

    quantised = nn.Linear(2, 3)
    quantised.weight = nn.Parameter(torch.randn(3, 2).as_subclass(Quantised))
    assert not can_fuse(quantised, nn.Linear)

"""The transformer against diffusers' `CogVideoXTransformer3DModel`: its parts, all five shapes, fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from cogvid.config import TransformerConfig
from cogvid.models.transformer import Transformer
from cogvid.ops import BlockContext, Shard
from cogvid.weights.names import map_transformer_state_dict
from measure import pooled_ratio, rel_rms
from references import TRANSFORMER_VARIANTS, call_diffusers, rotary_table, tiny_transformer
from tests.tolerances import (
    BATCH_FP32,
    BLOCK_FP32,
    EMBED_FP32,
    TRANSFORMER_BF16,
    TRANSFORMER_FP32,
    TRANSFORMER_FP64,
    TRANSFORMER_GRADIENTS_FP32,
)

TEXT, TEXT_WIDTH = 10, 40  # of the tiny models
SIZES = {
    "trained": (3, 8, 12),
    "longer": (4, 8, 12),
    "one-frame": (1, 8, 12),
    "portrait": (3, 12, 8),
    "other-size": (5, 6, 10),
}
Size = tuple[int, int, int]


def ours_like(reference: CogVideoXTransformer3DModel) -> Transformer:
    """Build our model with the reference's weights and dtype."""
    config = TransformerConfig.from_dict(dict(reference.config))
    model = Transformer(config).to(reference.dtype)
    model.load_state_dict(map_transformer_state_dict(reference.state_dict(), config), strict=True)
    return model.eval().requires_grad_(False)


def run_reference(reference: CogVideoXTransformer3DModel, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
    return call_diffusers(reference, latents, text, timestep, rotary_table(reference, latents))


def inputs(model: Transformer, size: Size, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return random latents, text and timesteps; a 1.5 model gets an even number of frames, as from a pipeline."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = size
    frames += frames % (model.config.patch_size_t or 1)
    latents = torch.randn(batch, model.config.in_channels, frames, height, width, generator=generator)
    prompt_embeds = torch.randn(batch, TEXT, TEXT_WIDTH, generator=generator)
    return latents, prompt_embeds, torch.tensor([999, 137, 19, 500])[:batch]


def fits(variant: str, size: Size) -> bool:
    """A model with learned positions takes one height and width."""
    return variant != "5b-i2v" or size[1:] == (8, 12)


ALL_SHAPES = [
    pytest.param(variant, size, id=f"{variant}-{name}")
    for variant in TRANSFORMER_VARIANTS
    for name, size in SIZES.items()
    if fits(variant, size)
]


@pytest.mark.parametrize(("variant", "size"), ALL_SHAPES)
def test_fp32(variant: str, size: Size) -> None:
    reference = tiny_transformer(variant)
    model = ours_like(reference)
    args = inputs(model, size)
    assert rel_rms(model(*args), run_reference(reference, *args)) < TRANSFORMER_FP32


@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_fp64(variant: str) -> None:
    """Without rounding, nothing but the rotation that diffusers does in fp32 is left between the two."""
    reference = tiny_transformer(variant).double()
    model = ours_like(reference)
    latents, prompt_embeds, timestep = inputs(model, SIZES["trained"])
    args = latents.double(), prompt_embeds.double(), timestep
    assert rel_rms(model(*args), run_reference(reference, *args)) < TRANSFORMER_FP64


@pytest.mark.parametrize(("variant", "size"), ALL_SHAPES)
def test_embedded_tokens(variant: str, size: Size) -> None:
    """The input of the first block: patches, text and added positions."""
    reference = tiny_transformer(variant)
    model = ours_like(reference)
    latents, prompt_embeds, timestep = inputs(model, size)
    kept: list[Tensor] = []

    class Keep:
        state: ClassVar[dict[str, Any]] = {}

        def run(self, x: Tensor, context: BlockContext, blocks: Callable[..., Tensor]) -> Tensor:  # noqa: ARG002
            kept.append(x)
            return x

    model(latents, prompt_embeds, timestep, step_cache=Keep())
    assert rel_rms(kept[0], reference.patch_embed(prompt_embeds, latents.transpose(1, 2))) < EMBED_FP32


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_block(variant: str) -> None:
    reference = tiny_transformer(variant)
    model = ours_like(reference)
    latents, _, _ = inputs(model, SIZES["trained"])
    rotary = rotary_table(reference, latents)
    generator = torch.Generator().manual_seed(1)
    video_len = 3 * 4 * 6
    x = torch.randn(2, TEXT + video_len, model.config.hidden_size, generator=generator)
    temb = torch.randn(2, model.config.time_embed_dim, generator=generator)

    video, text = reference.transformer_blocks[1](x[:, TEXT:], x[:, :TEXT], temb, image_rotary_emb=rotary)
    rope = None if rotary is None else (rotary[0][:, ::2], rotary[1][:, ::2])
    shard = Shard(0, TEXT + video_len, TEXT + video_len)
    ours = model.blocks[1](x, BlockContext(torch.nn.functional.silu(temb), rope, TEXT, (3, 4, 6), shard))
    assert rel_rms(ours, torch.cat([text, video], dim=1)) < BLOCK_FP32


@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_bf16_is_no_worse_than_diffusers(variant: str) -> None:
    """Both errors are against diffusers in fp64 with the same bf16 weights, over four seeds of a wider model."""
    errors = []
    for seed in range(4):
        wide: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 3}
        reference = tiny_transformer(variant, seed, **wide).bfloat16()
        model, truth = ours_like(reference), deepcopy(reference).double()
        latents, prompt_embeds, timestep = inputs(model, SIZES["trained"], seed=seed)
        latents, prompt_embeds = latents.bfloat16(), prompt_embeds.bfloat16()
        with torch.inference_mode():
            exact = run_reference(truth, latents.double(), prompt_embeds.double(), timestep)
            ours = model(latents, prompt_embeds, timestep)
            theirs = run_reference(reference, latents, prompt_embeds, timestep)
        errors.append((rel_rms(ours, exact), rel_rms(theirs, exact)))
    assert pooled_ratio(errors) <= TRANSFORMER_BF16


@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_gradients(variant: str) -> None:
    """Every parameter gets the gradient that diffusers gives it, and so do the latents and the text."""
    reference = tiny_transformer(variant).requires_grad_(True)
    model = ours_like(reference).requires_grad_(True)
    latents, prompt_embeds, timestep = inputs(model, SIZES["trained"])
    grads = []
    for run in (model, lambda *args: run_reference(reference, *args)):
        leaves = [latents.clone().requires_grad_(), prompt_embeds.clone().requires_grad_()]
        run(*leaves, timestep).square().mean().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert rel_rms(ours, theirs) < TRANSFORMER_GRADIENTS_FP32

    their_grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
    their_grads |= dict(reference.named_buffers())  # the mapping wants the whole state
    mapped = map_transformer_state_dict({name: their_grads[name] for name in reference.state_dict()}, model.config)
    for name, parameter in model.named_parameters():
        if variant == "2b" and name.endswith("k_norm.bias"):
            # Without a rotation it moves all logits of a query alike: the true gradient is zero, this is rounding.
            assert parameter.grad.norm() < TRANSFORMER_GRADIENTS_FP32 * mapped[name.replace("bias", "weight")].norm()
            continue
        assert rel_rms(parameter.grad, mapped[name]) < TRANSFORMER_GRADIENTS_FP32, name


@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_batch_of_two_is_two_batches_of_one(variant: str) -> None:
    model = ours_like(tiny_transformer(variant))
    args = inputs(model, SIZES["longer"])
    apart = torch.cat([model(*(a[i : i + 1] for a in args)) for i in range(2)])
    assert rel_rms(model(*args), apart) < BATCH_FP32


def test_tables_follow_the_size() -> None:
    """Tables are kept from call to call; another size, and training after inference, get their own."""
    model = ours_like(tiny_transformer("5b-i2v"))
    for size in (SIZES["trained"], SIZES["longer"], SIZES["trained"]):
        args = inputs(model, size)
        with torch.inference_mode():
            kept = model(*args)
        assert torch.equal(kept, deepcopy(model)(*args))
    model.requires_grad_(True)
    model(*args).sum().backward()


class TestLearnedPositions:
    """5B-I2V at another frame count than its own."""

    def test_default_is_the_sincos_table_of_diffusers(self) -> None:
        reference = tiny_transformer("5b-i2v")
        model = ours_like(reference)
        args = inputs(model, (2, 8, 12))
        assert rel_rms(model(*args), run_reference(reference, *args)) < TRANSFORMER_FP32
        assert rel_rms(model(*args, learned_positions="slice"), model(*args)) > 0.1

    def test_slice_is_a_reference_that_was_made_for_fewer_frames(self) -> None:
        whole = tiny_transformer("5b-i2v")
        reference = tiny_transformer("5b-i2v", sample_frames=5)
        table = whole.patch_embed.pos_embedding[:, : TEXT + 2 * 4 * 6]
        reference.load_state_dict(whole.state_dict() | {"patch_embed.pos_embedding": table})
        model = ours_like(whole)
        args = inputs(model, (2, 8, 12))
        assert rel_rms(model(*args, learned_positions="slice"), run_reference(reference, *args)) < TRANSFORMER_FP32

    def test_a_new_model_starts_from_the_table_of_diffusers(self) -> None:
        reference = CogVideoXTransformer3DModel(**dict(tiny_transformer("5b-i2v").config))
        model = Transformer(TransformerConfig.from_dict(dict(reference.config)))
        assert torch.equal(model.pos_embedding, reference.patch_embed.pos_embedding.float())


class TestStepCache:
    def test_passing_through_changes_no_bit(self) -> None:
        class PassThrough:
            def run(self, x: Tensor, temb: Tensor, blocks: Callable[..., Tensor]) -> Tensor:  # noqa: ARG002
                return blocks(x)

        model = ours_like(tiny_transformer("5b"))
        args = inputs(model, SIZES["trained"])
        assert torch.equal(model(*args, step_cache=PassThrough()), model(*args))

    def test_the_first_block_can_run_apart(self) -> None:
        class FirstBlock:
            state: ClassVar[dict[str, Any]] = {}

            def run(self, x: Tensor, context: BlockContext, blocks: Callable[..., Tensor]) -> Tensor:  # noqa: ARG002
                return blocks(blocks(x, 0, 1), 1)

        model = ours_like(tiny_transformer("5b"))
        args = inputs(model, SIZES["trained"])
        assert torch.equal(model(*args, step_cache=FirstBlock()), model(*args))

    def test_a_skipped_step_adds_the_last_change(self) -> None:
        class EverySecond:
            def __init__(self) -> None:
                self.state: dict[str, Any] = {}
                self.temb: list[Tensor] = []

            def run(self, x: Tensor, context: BlockContext, blocks: Callable[..., Tensor]) -> Tensor:
                self.temb.append(context.temb)
                if "change" in self.state:
                    return x + self.state.pop("change")
                self.state["change"] = blocks(x) - x
                return x + self.state["change"]

        model, cache = ours_like(tiny_transformer("2b")), EverySecond()
        calls: list[int] = []
        model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        latents, prompt_embeds, timestep = inputs(model, SIZES["trained"])
        first, second, third = (model(latents, prompt_embeds, timestep - 10 * i, step_cache=cache) for i in range(3))
        assert len(calls) == 2
        assert rel_rms(third, model(latents, prompt_embeds, timestep - 20)) < BATCH_FP32
        assert rel_rms(second, model(latents, prompt_embeds, timestep - 10)) > BATCH_FP32
        assert not torch.equal(first, second)
        assert not torch.equal(cache.temb[0], cache.temb[1])


WRONG = {
    "channels": ("5b", "latents", (2, 15, 3, 8, 12), r"latents: got \[2, 15, 3, 8, 12\], want \[B, 16, T, h, w\]"),
    "image-channels": ("5b-i2v", "latents", (2, 16, 3, 8, 12), r"want \[B, 32, T, h, w\]"),
    "odd-height": (
        "5b",
        "latents",
        (2, 16, 3, 7, 12),
        r"latents: got T, h, w = 3, 7, 12, want multiples of \(1, 2, 2\)",
    ),
    "odd-width": ("2b", "latents", (2, 16, 3, 8, 11), "want multiples of"),
    "odd-frames": ("1.5-5b", "latents", (2, 16, 3, 8, 12), r"got T, h, w = 3, 8, 12, want multiples of \(2, 2, 2\)"),
    "no-frames": ("5b", "latents", (2, 16, 0, 8, 12), "want multiples of"),
    "text-length-2b": ("2b", "prompt_embeds", (2, 9, 40), "prompt_embeds: got 9 tokens, want 10"),
    "text-length-5b-i2v": ("5b-i2v", "prompt_embeds", (2, 11, 40), "prompt_embeds: got 11 tokens, want 10"),
    "text-width": ("5b", "prompt_embeds", (2, 10, 41), r"prompt_embeds: got \[2, 10, 41\], want \[2, L, 40\]"),
    "text-batch": ("5b", "prompt_embeds", (1, 10, 40), r"prompt_embeds: got \[1, 10, 40\], want \[2, L, 40\]"),
    "timestep": ("5b", "timestep", (1,), r"timestep: got shape \[1\], want \[2\]"),
    "learned-size": ("5b-i2v", "latents", (2, 32, 3, 12, 8), "latents: got 12x8, want 8x12"),
}


@pytest.mark.parametrize(("variant", "name", "shape", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_shapes_raise(variant: str, name: str, shape: tuple[int, ...], message: str) -> None:
    model = ours_like(tiny_transformer(variant))
    latents, prompt_embeds, timestep = inputs(model, SIZES["trained"])
    args = {"latents": latents, "prompt_embeds": prompt_embeds, "timestep": timestep}
    with pytest.raises(ValueError, match=message):
        model(**(args | {name: torch.zeros(shape)}))


def test_wrong_dtype_raises() -> None:
    model = ours_like(tiny_transformer("5b"))
    latents, prompt_embeds, timestep = inputs(model, SIZES["trained"])
    with pytest.raises(ValueError, match=r"latents: got torch.bfloat16, want the model's torch.float32"):
        model(latents.bfloat16(), prompt_embeds, timestep)


def test_learned_positions_are_for_the_configured_frame_count_to_the_frame() -> None:
    """12 frames make as many latents as 9 do, but upstream asks for the 12 that no count of latents stands for."""
    reference = tiny_transformer("5b-i2v", sample_frames=12)
    model = ours_like(reference)
    args = inputs(model, SIZES["trained"])
    assert rel_rms(model(*args), run_reference(reference, *args)) < TRANSFORMER_FP32
    assert rel_rms(model(*args, learned_positions="slice"), model(*args)) > 0.1


def test_wrong_learned_positions_raise() -> None:
    model = ours_like(tiny_transformer("5b-i2v"))
    with pytest.raises(ValueError, match="learned_positions: got 'crop', want one of sincos, slice"):
        model(*inputs(model, SIZES["trained"]), learned_positions="crop")
    with pytest.raises(ValueError, match="latents: got 4 frames, want at most 3 with learned_positions='slice'"):
        model(*inputs(model, SIZES["longer"]), learned_positions="slice")


@pytest.mark.parametrize("variant", ["5b", "1.5-5b", "1.5-5b-i2v"])
def test_text_length_is_free_without_added_positions(variant: str) -> None:
    reference = tiny_transformer(variant)
    model = ours_like(reference)
    latents, prompt_embeds, timestep = inputs(model, SIZES["trained"])
    args = latents, prompt_embeds[:, :7], timestep
    assert rel_rms(model(*args), run_reference(reference, *args)) < TRANSFORMER_FP32

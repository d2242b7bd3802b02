"""DDIM inversion and editing against the arithmetic of the official script, run with diffusers' parts.

The script is inference/ddim_inversion.py of zai-org/CogVideo, 7a1af71: its `sample` and its attention processor are
written again here.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cogvid
from measure import rel_rms
from references import TEXT_LEN, picture, save_pipeline, tiny_pipeline
from tests import tolerances
from tests.schedulers import SCHEDULERS

PROMPT, STEPS, SCALE = "a red", 5, 3.0
SIZE: dict[str, Any] = {"height": 32, "width": 48}
CLIP = [picture(32, 48, seed=i) for i in range(9)]


class JoinedAttention:
    """Attention of the first half of a batch to the keys and values of both halves; of the second to its own."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, image_rotary_emb: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (to(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            for each in (q, k):  # each group of image tokens is rotated by itself
                each[:, :, text:] = apply_rotary_emb(each[:, :, text:], image_rotary_emb)
        halves = [each.chunk(2) for each in (q, k, v)]
        (q, q_ref), (k, k_ref), (v, v_ref) = halves
        own = F.scaled_dot_product_attention(q, torch.cat([k, k_ref], dim=2), torch.cat([v, v_ref], dim=2))
        out = torch.cat([own, F.scaled_dot_product_attention(q_ref, k_ref, v_ref)])
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return out[:, text:], out[:, :text]


@torch.no_grad()
def script_sample(
    pipe: Any, latents: Tensor, scheduler: Any, prompt: str, scale: float, reference: Tensor | None = None
) -> Tensor:
    """Return the trajectory `[steps, B, T, C, h, w]`."""
    embeds, negative = pipe.encode_prompt(prompt, "", True, max_sequence_length=TEXT_LEN)
    embeds = torch.cat([negative, embeds])
    if reference is not None:
        embeds = torch.cat([embeds, embeds])
    scheduler.set_timesteps(STEPS)
    rotary = None
    if pipe.transformer.config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(32, 48, latents.shape[1], torch.device("cpu"))
    trajectory = []
    for i, t in enumerate(scheduler.timesteps):
        inputs = torch.cat([latents, latents])
        if reference is not None:
            inputs = torch.cat([inputs, reference[i], reference[i]])
        predicted = pipe.transformer(inputs, embeds, t.expand(len(inputs)), image_rotary_emb=rotary, return_dict=False)[
            0
        ].float()
        if reference is not None:
            predicted, _ = predicted.chunk(2)
        uncond, cond = predicted.chunk(2)
        latents = scheduler.step(uncond + scale * (cond - uncond), t, latents, return_dict=False)[0]
        trajectory.append(latents)
    return torch.stack(trajectory)


@pytest.fixture(scope="module", params=[("5b", False), ("5b", True), ("1.5-5b", False)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, cogvid.Pipeline]:
    variant, clip = request.param  # the official checkpoints do not clip
    reference, spiece = tiny_pipeline(variant)
    reference.scheduler = SCHEDULERS["ddim"].from_config(reference.scheduler.config, clip_sample=clip)
    return reference, cogvid.load(save_pipeline(reference, spiece, tmp_path_factory.mktemp("pair")), device="cpu")


def inverted(pair: tuple[Any, cogvid.Pipeline], frames: int) -> tuple[Tensor, Tensor, cogvid.Inversion]:
    """The script's clean latents and trajectory, and ours."""
    from diffusers import DDIMInverseScheduler

    reference, ours = pair
    pixels = reference.video_processor.preprocess_video(CLIP[:frames], height=32, width=48)
    with torch.no_grad():
        drawn = reference.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(7)).transpose(1, 2)
    clean = drawn * reference.vae.config.scaling_factor
    scheduler = DDIMInverseScheduler(**reference.scheduler.config)
    theirs = script_sample(reference, clean, scheduler, "", SCALE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cogvid.invert(ours, CLIP[:frames], seed=7, num_inference_steps=STEPS, progress=False, **SIZE)
    return clean, theirs, found


@pytest.mark.parametrize("frames", [8, 9])
def test_inversion_and_editing_equal_the_script(pair: tuple[Any, cogvid.Pipeline], frames: int) -> None:
    reference, ours = pair
    if frames == 9 and ours.model.transformer.patch_size_t:
        pytest.skip("the script cannot: 3 latent frames do not fill the temporal patches of 1.5")
    clean, theirs, found = inverted(pair, frames)
    assert rel_rms(found.clean, clean) <= tolerances.PIPELINE_LATENTS
    assert found.latents.shape == theirs.shape
    for mine, expected in zip(found.latents, theirs, strict=True):
        assert rel_rms(mine, expected) <= tolerances.PIPELINE_LATENTS
    assert found.timesteps == (199, 399, 599, 799, 999)
    assert torch.equal(found.noise, found.latents[-1])

    # Reconstruction: other noise, and the keys and values of the inversion in attention.
    before = reference.transformer.attn_processors
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(8))
    try:
        reference.transformer.set_attn_processor(JoinedAttention())
        expected = script_sample(reference, noise, reference.scheduler, PROMPT, SCALE, theirs.flip(0))[-1]
    finally:
        reference.transformer.set_attn_processor(before)
    options: dict[str, Any] = {"guidance_scale": SCALE, "progress": False, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = cogvid.edit(ours, found, PROMPT, seed=8, **options)
        plain = ours(PROMPT, seed=8, scheduler="ddim", num_frames=frames, num_inference_steps=STEPS, **SIZE, **options)
        again = ours(PROMPT, seed=8, scheduler="ddim", num_frames=frames, num_inference_steps=STEPS, **SIZE, **options)
    assert rel_rms(out.frames, expected) <= tolerances.PIPELINE_LATENTS
    assert rel_rms(out.frames, plain.frames) > 1e-3
    assert torch.equal(plain.frames, again.frames)  # what `edit` changed is put back
    assert "inversion" in out.provenance["given"]

    # From the inverted latents, without attention to the video.
    without = script_sample(reference, theirs[-1], reference.scheduler, PROMPT, SCALE)[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved = ours(
            PROMPT,
            latents=found.noise,
            scheduler="ddim",
            num_frames=frames,
            num_inference_steps=STEPS,
            **SIZE,
            **options,
        )
    assert rel_rms(moved.frames, without) <= tolerances.PIPELINE_LATENTS


def test_guidance_does_not_matter_without_a_prompt(pair: tuple[Any, cogvid.Pipeline]) -> None:
    _, ours = pair
    options: dict[str, Any] = {"seed": 7, "num_inference_steps": STEPS, "progress": False, **SIZE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = cogvid.invert(ours, CLIP[:8], **options)
        guided = cogvid.invert(ours, CLIP[:8], guidance_scale=6.0, **options)
        told = cogvid.invert(ours, CLIP[:8], PROMPT, guidance_scale=6.0, **options)
    assert rel_rms(guided.noise, plain.noise) <= tolerances.PIPELINE_LATENTS
    assert rel_rms(told.noise, plain.noise) > 1e-3


def test_the_attention_that_is_joined_is_the_one_of_the_pipeline(pair: tuple[Any, cogvid.Pipeline]) -> None:
    _, ours = pair
    seen: list[tuple[int, int]] = []
    base = ours.transformer.ops

    def counted(q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return base.attention(q, k, v, context)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cogvid.invert(ours, CLIP[:8], seed=7, num_inference_steps=2, progress=False, **SIZE)
        try:
            ours.set_ops(dataclasses.replace(base, attention=counted))
            cogvid.edit(ours, found, PROMPT, seed=8, output_type="latent", progress=False)
        finally:
            ours.set_ops(base)
    assert {keys // queries for queries, keys in seen} == {1, 2}
    assert len(seen) == 2 * 2 * ours.model.transformer.num_layers
    assert ours.transformer.ops.attention is base.attention

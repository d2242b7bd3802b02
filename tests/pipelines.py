"""Tiny reference pipelines: the real diffusers and transformers classes with random weights, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import T5Tokenizer

from tests.reference import tiny_transformer, tiny_vae
from tests.tiny_text import spiece_model, tiny_encoder

if TYPE_CHECKING:
    from diffusers import CogVideoXVideoToVideoPipeline

TEXT_LEN = 10  # of `tiny_transformer`
SNR_SHIFT = {"2b": 3.0}  # 1.0 otherwise


def tiny_pipeline(variant: str, seed: int = 0, **transformer: Any) -> tuple[Any, bytes]:
    """Build the diffusers pipeline of a variant of `tests.reference`, and its `spiece.model`."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline

    scaling = {"scaling_factor": 0.7} if variant != "2b" else {}
    scheduler = CogVideoXDDIMScheduler(
        snr_shift_scale=SNR_SHIFT.get(variant, 1.0),
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    vae = tiny_vae(seed, latent_channels=16, invert_scale_latents=variant.startswith("1.5"), **scaling)
    pipeline_class = CogVideoXImageToVideoPipeline if variant.endswith("i2v") else CogVideoXPipeline
    return assemble(pipeline_class, tiny_transformer(variant, seed, **transformer), vae, scheduler, seed)


def assemble(
    pipeline_class: type, transformer: Any, vae: Any, scheduler: Any, seed: int = 0, extra_ids: int = 0
) -> tuple[Any, bytes]:
    """Join the parts to a pipeline, with tiny text parts, and return it and its `spiece.model`; changes `vae`.

    extra_ids: how many ids the tokenizer has beyond the rows of the encoder's embedding.
    """
    # Less contrast: the pixels of the untouched model are clamped to black and white, and agree whatever was computed.
    vae.decoder.conv_out.conv.weight *= 0.15
    spiece = spiece_model()
    pieces = SentencePieceProcessor(model_proto=spiece)
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    pipe = pipeline_class(
        tokenizer=T5Tokenizer(vocab=vocab, extra_ids=extra_ids),
        text_encoder=tiny_encoder(len(vocab), seed),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, spiece


def as_video_to_video(pipe: Any) -> CogVideoXVideoToVideoPipeline:
    """Give the parts of a text-to-video pipeline to the video-to-video one."""
    from diffusers import CogVideoXVideoToVideoPipeline

    other = CogVideoXVideoToVideoPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def save_pipeline(pipe: Any, spiece: bytes, directory: Path) -> Path:
    """Write a pipeline in the official layout, `spiece.model` included."""
    pipe.save_pretrained(directory)
    (directory / "tokenizer" / "spiece.model").write_bytes(spiece)
    return directory


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Make a smooth random picture."""
    noise = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise[None], (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((smooth * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

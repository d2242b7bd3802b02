"""Tiny checkpoints in the official layout, written by our own side: no diffusers needed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from cogvid.config import ScheduleConfig, TransformerConfig, VAEConfig
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.weights.load import save_transformer, save_vae

TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    num_layers=2,
    text_embed_dim=48,
    time_embed_dim=32,
    max_text_seq_length=8,
    sample_frames=17,
    sample_height=8,
    sample_width=12,
    use_rotary_positional_embeddings=True,
)
VAE_CONFIG = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.7)
SCHEDULER = {
    "_class_name": "CogVideoXDPMScheduler",
    **ScheduleConfig(snr_shift_scale=1.0).to_dict(),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def edit_json(path: Path, **values: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **values})


def write_checkpoint(directory: Path, transformer: TransformerConfig = TRANSFORMER) -> Path:
    """Write all that `read_model_config` and the loaders of transformer and VAE need, with random weights."""
    torch.manual_seed(0)
    save_transformer(Transformer(transformer), directory / "transformer")
    save_vae(VAE(VAE_CONFIG), directory / "vae")
    write_json(directory / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(directory / "text_encoder" / "config.json", {"d_model": 48, "architectures": ["T5EncoderModel"]})
    write_json(
        directory / "model_index.json",
        {
            "_class_name": "CogVideoXImageToVideoPipeline" if transformer.in_channels == 32 else "CogVideoXPipeline",
            "_diffusers_version": "0.31.0",
            "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        },
    )
    return directory


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()

"""Tiny checkpoints in the official layout, written by our own side: no diffusers needed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import cogvid
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


def write_variant(directory: Path, pack: str, class_name: str | None = None, extra: int = 0) -> Path:
    """Write a shipped pack as a checkpoint of another kind. extra: random input channels of its transformer."""
    shutil.copytree(cogvid.load(pack, device="cpu").checkpoint.directory, directory)
    if class_name is not None:
        edit_json(directory / "model_index.json", _class_name=class_name)
    path = directory / "transformer" / WEIGHTS
    state = load_file(path)
    weight = state["patch_embed.proj.weight"]
    more = torch.randn(weight.shape[0], extra, *weight.shape[2:], generator=torch.Generator().manual_seed(0))
    state["patch_embed.proj.weight"] = torch.cat([weight, 0.05 * more.to(weight)], dim=1).contiguous()
    save_file(state, path, metadata={"format": "pt"})
    edit_json(directory / "transformer" / "config.json", in_channels=weight.shape[1] + extra)
    return directory


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()

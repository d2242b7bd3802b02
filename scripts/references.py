"""The diffusers and transformers models that cogvid is compared with: tiny, reduced or full size, with random weights.

Used by the scripts and by the tests. diffusers, transformers and sentencepiece are imported only by the functions that
need them.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

import measure  # noqa: F401 - makes cogvid importable

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, CogVideoXVideoToVideoPipeline
    from transformers import T5EncoderModel

    from cogvid.config import ScheduleConfig, TransformerConfig, VAEConfig

Module = TypeVar("Module", bound=nn.Module)

TRANSFORMER_VARIANTS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")

# Small, but every width differs from every other one, so that a swapped axis cannot pass.
_TINY: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "num_layers": 2,
    "in_channels": 16,
    "out_channels": 16,
    "text_embed_dim": 40,
    "time_embed_dim": 24,
    "max_text_seq_length": 10,
    "sample_frames": 9,
    "sample_height": 8,
    "sample_width": 12,
}
_ROTARY: dict[str, Any] = {"use_rotary_positional_embeddings": True}
_V15: dict[str, Any] = {
    **_ROTARY,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_frames": 13,
    "sample_height": 300,
    "sample_width": 300,
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": _ROTARY,
    "5b-i2v": {**_ROTARY, "in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5-5b": _V15,
    "1.5-5b-i2v": {**_V15, "in_channels": 32, "ofs_embed_dim": 24},
}
TEXT_LEN, TEXT_WIDTH = 10, 40  # of the tiny transformers: tokens, and channels of a token
SNR_SHIFT = {"2b": 3.0}  # 1.0 otherwise
_WORDS = (
    "a red blue green circle circle. circles square triangle moves to the left right up down grows shrinks stays still"
    " on white background panda dressed in small jacket café naïve über straße garçon élève"
    " 12 3 4 . , ! ? ( ) - ' \" ; : ê"
)


def has_diffusers() -> bool:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return False
    return True


def schedulers() -> dict[str, Any]:
    """Return diffusers' scheduler classes by the names of our samplers."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    return {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}


def perturb(module: Module, seed: int = 0, scale: float = 0.1) -> Module:
    """Add seeded noise to every parameter, norms and biases included, so that a dropped or swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


def tiny_transformer(variant: str, seed: int = 0, **overrides: Any) -> CogVideoXTransformer3DModel:
    """Build the real diffusers transformer of one of `TRANSFORMER_VARIANTS`, tiny, every parameter perturbed."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    model: Any = perturb(CogVideoXTransformer3DModel(**{**_TINY, **_VARIANTS[variant], **overrides}), seed)
    if model.config["use_learned_positional_embeddings"]:
        # The learned table starts as the sin-cos one; noise makes the two distinguishable.
        table = model.patch_embed.pos_embedding
        model.patch_embed.pos_embedding = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


def tiny_vae(seed: int = 0, **overrides: Any) -> AutoencoderKLCogVideoX:
    """Build the real diffusers VAE, tiny, every parameter perturbed."""
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "block_out_channels": (8, 16, 16, 24),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "sample_height": 64,
        "sample_width": 96,
    }
    return perturb(AutoencoderKLCogVideoX(**{**config, **overrides}), seed).eval().requires_grad_(False)


@cache
def spiece_model(rule: str = "nmt_nfkc") -> bytes:
    """Train a T5-like sentencepiece model."""
    import sentencepiece

    draw, words, model = random.Random(0), _WORDS.split(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter([" ".join(draw.choices(words, k=10)) for _ in range(2000)]),
        model_writer=model,
        vocab_size=150,
        model_type="unigram",
        normalization_rule_name=rule,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def tiny_encoder(vocab_size: int, seed: int = 0) -> T5EncoderModel:
    """Build a T5 encoder with every parameter perturbed; its width is that of the tiny transformers' text."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=12,
        d_ff=56,
        num_layers=3,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )
    torch.manual_seed(seed)
    return perturb(T5EncoderModel(config), seed).eval().requires_grad_(False)


def tiny_pipeline(variant: str, seed: int = 0, **transformer: Any) -> tuple[Any, bytes]:
    """Build the diffusers pipeline of a variant, and its `spiece.model`."""
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
    from sentencepiece import SentencePieceProcessor
    from transformers import T5Tokenizer

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
    """Return a video-to-video pipeline with the parts of a text-to-video one."""
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


def t5(values: dict[str, int]) -> Any:
    from transformers import T5Config, T5EncoderModel

    options: dict[str, Any] = {**values, "feed_forward_proj": "gated-gelu"}
    return T5EncoderModel(T5Config(**options))


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Set every parameter to random values that keep activations near unit size."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.02)
    return module


def build(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """Make a module in its dtype on its device, with random weights."""
    torch.set_default_dtype(dtype)
    try:
        with device:
            module = make().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return randomise(module)


def diffusers_transformer(config: TransformerConfig) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    values = config.to_dict()
    values.pop("qk_norm_eps")  # a constant there
    return CogVideoXTransformer3DModel(**values)


def diffusers_vae(config: VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    count = len(config.block_out_channels)
    blocks: dict[str, Any] = {
        f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * count for way in ("down", "up")
    }
    return AutoencoderKLCogVideoX(**config.to_dict(), **blocks)


def call_diffusers(
    model: Any, latents: Tensor, text: Tensor, timestep: Tensor, rotary: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Call diffusers' transformer as its pipelines do; latents in and out are ours, `[B, C, T, h, w]`."""
    ofs = latents.new_full((1,), 2.0) if model.config.ofs_embed_dim else None
    (out,) = model(latents.transpose(1, 2), text, timestep, ofs=ofs, image_rotary_emb=rotary, return_dict=False)
    return out.transpose(1, 2)


def rotary_table(model: Any, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """The table that diffusers' pipelines hand to their transformer for `[B, C, T, h, w]`; ours makes it inside."""
    if not model.config.use_rotary_positional_embeddings:
        return None
    from diffusers import CogVideoXPipeline

    pipe: Any = SimpleNamespace(vae_scale_factor_spatial=8, transformer=model)  # all that the method reads
    frames, height, width = latents.shape[2:]
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, height * 8, width * 8, frames, latents.device)


def run_samplers(name: str, config: ScheduleConfig, scheduler: Any, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Run our sampler and diffusers' scheduler on a made-up velocity, a smooth function of the state, from one seed.

    Returns the two final states, `[1, 4, 3, 6, 8]` fp32.
    """
    from cogvid.sampling.samplers import sample
    from cogvid.sampling.schedule import make_schedule

    x = torch.randn(1, 4, 3, 6, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    schedule = make_schedule(config, steps)
    ours = sample(lambda x, *_: x.sin(), x, schedule, sampler=name, generator=torch.Generator().manual_seed(6))

    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(6)
    state, previous = x.transpose(1, 2), None
    for i, t in enumerate(scheduler.timesteps):
        velocity = state.sin()
        if name == "dpm":
            last = scheduler.timesteps[i - 1] if i else None
            state, previous = scheduler.step(velocity, previous, t, last, state, generator=generator, return_dict=False)
        else:
            state = scheduler.step(velocity, t, state, return_dict=False)[0]
    return ours, state.transpose(1, 2)

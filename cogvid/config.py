"""What each CogVideoX model is: architecture, latent geometry, schedule, recommended settings; and the dtype policy.

`CONFIGS` holds the five official models and the shipped packs. A dataclass default is the value that most checkpoints
share, so an entry states only what differs. Fields are named as in the `config.json` files of the official layout, so
`from_dict` reads those files as they are. Frames, latent sizes and patch grids are computed here and nowhere else.

dtype policy, in one place:
- weights and activations run in the dtype given to `load`;
- always fp32 whatever that is: norm statistics, RoPE tables, modulation arithmetic, guidance, sampler arithmetic;
- the noise schedule is fp64; pixels leave the VAE in its own dtype and are rounded, never truncated, to uint8;
- fp16 is never run on a CPU (ten times slower than bf16 there, and 5B overflows in it): bf16 replaces it, or fp32 on a
  CPU that is slow at bf16 too;
- a bf16 model runs in fp32 on a CPU that is slow at bf16 (without AVX-512, decoding takes over ten times as long),
  unless the caller asks for bf16. `placement.resolve_dtype` is the code, and warns of every change.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NoReturn

from cogvid.json_config import Count, Depth, JsonConfig, Length, Positive

Grid = tuple[int, int, int]  # (frames, height, width) of the video tokens, in patches; width runs fastest

HEAD_DIM_SPLIT = (4, 6, 6)  # sixteenths of head_dim for time, height and width in the 3-D tables: 16, 24 and 24 of 64
LEARNED_POSITIONS = ("sincos", "slice")  # what 5B-I2V may add at another frame count; see `Transformer.forward`
PREVIOUS_TIMESTEPS = ("diffusers", "next")  # where a step ends; see `schedule.make_schedule`
UPSTREAMS = ("diffusers", "sat")  # the two codes that run these models; sat is the authors' own
TASKS: dict[str, tuple[str, ...]] = {  # what each task is given beside the text
    "text-to-video": (),
    "image-to-video": ("image",),
    "first-and-last-frame": ("image", "last_image"),
    "video-to-video": ("video",),
    "inpainting": ("video", "mask"),
    "control-to-video": ("control_video",),
}
_TASKS_OF = {  # by what a model takes on its channels, the names of its conditions
    (): ("text-to-video", "video-to-video"),
    ("image",): ("image-to-video", "first-and-last-frame"),
    ("mask",): ("text-to-video", "image-to-video", "first-and-last-frame", "video-to-video", "inpainting"),
    ("control_video",): ("control-to-video",),
}


def _refuse(name: str, value: Any, want: str) -> NoReturn:
    raise ValueError(f"{name}: got {value!r:.60}, want {want}")


@dataclass(frozen=True)
class TransformerConfig(JsonConfig):
    """Architecture of the expert transformer; defaults are CogVideoX-2B. Source: `CogVideoXTransformer3DModel`."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    num_layers: Depth = 30
    in_channels: int = 16  # 32 for image-to-video: noisy latents, then image latents
    out_channels: int = 16
    text_embed_dim: int = 4096
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None  # 1.5-5B-I2V only
    patch_size: int = 2
    patch_size_t: int | None = None  # 2 for 1.5; None: frames are patched one by one
    patch_bias: bool = True  # of the 1.0 convolution; the 1.5 linear always has one
    max_text_seq_length: Length = 226
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    sample_frames: int = 49
    sample_height: int = 60
    sample_width: int = 90
    temporal_compression_ratio: int = 4
    spatial_interpolation_scale: Positive = 1.875
    temporal_interpolation_scale: Positive = 1.0
    norm_eps: Positive = 1e-5
    qk_norm_eps: Positive = 1e-6

    def __post_init__(self) -> None:
        rotary, learned = self.use_rotary_positional_embeddings, self.use_learned_positional_embeddings
        split = sum(HEAD_DIM_SPLIT)  # of a multiple of this, each share has an even width
        if rotary and self.attention_head_dim % split:
            _refuse("attention_head_dim", self.attention_head_dim, f"a multiple of {split} with rotary positions")
        if self.adds_positions and self.hidden_size % split:
            what = "num_attention_heads * attention_head_dim"
            _refuse(what, self.hidden_size, f"a multiple of {split} with added positions")
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            _refuse("ofs_embed_dim", self.ofs_embed_dim, f"the time_embed_dim, {self.time_embed_dim}, or null")
        if self.ofs_embed_dim is not None and self.ofs_embed_dim % 2:
            _refuse("ofs_embed_dim", self.ofs_embed_dim, "an even number")
        for name in ("sample_height", "sample_width"):
            size, patch = getattr(self, name), self.patch_size
            if learned and size % patch:
                _refuse(name, size, f"a multiple of the patch_size, {patch}, with learned positions")
            if rotary and self.patch_size_t is None and size < patch:
                _refuse(name, size, f"at least the patch_size, {patch}")

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns in a patch."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def adds_positions(self) -> bool:
        """True when a position table, sin-cos or learned, is added to the tokens."""
        return self.use_learned_positional_embeddings or not self.use_rotary_positional_embeddings

    @property
    def trained_grid(self) -> Grid:
        """The grid at the sample size."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return frames, self.sample_height // self.patch_size, self.sample_width // self.patch_size

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """The grid of latents of this size."""
        time, rows, columns = self.patch
        return frames // time, height // rows, width // columns

    def is_sample_length(self, latent_frames: int) -> bool:
        """True when clips of this length have `sample_frames` pixel frames."""
        return (latent_frames - 1) * self.temporal_compression_ratio + 1 == self.sample_frames


@dataclass(frozen=True)
class VAEConfig(JsonConfig):
    """Architecture and latent scale of the 3-D causal VAE. Source: `AutoencoderKLCogVideoX`."""

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: Depth = 3
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    norm_num_groups: int = 32
    norm_eps: Positive = 1e-6
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: Positive = 1.15258426
    invert_scale_latents: bool = False

    def __post_init__(self) -> None:
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            _refuse("norm_num_groups", self.norm_num_groups, f"a divisor of each of {list(self.block_out_channels)}")
        # Each block except the last may halve the frames. The encoder takes 8 at a time, so at most three blocks do.
        ratios = [2**i for i in range(min(len(self.block_out_channels), 4))]
        if self.temporal_compression_ratio not in ratios:
            _refuse("temporal_compression_ratio", self.temporal_compression_ratio, f"one of {ratios}")

    @property
    def spatial_compression_ratio(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    def latent_frames(self, num_frames: int) -> int:
        """Return how many latent frames a clip of `num_frames` is encoded to."""
        return (num_frames - 1) // self.temporal_compression_ratio + 1

    def decoded_frames(self, latent_frames: int) -> int:
        """Return how many pixel frames are decoded. If `latent_frames` is odd, the first of them gives one."""
        ratio = self.temporal_compression_ratio
        return ratio * latent_frames - (ratio - 1) * (latent_frames % 2)


@dataclass(frozen=True)
class ScheduleConfig(JsonConfig):
    """Noise schedule: the settings of `CogVideoXDDIMScheduler` and `CogVideoXDPMScheduler`, which are the same.

    The defaults are those of CogVideoX-2B, as its converter writes them. Four of them differ from the defaults of the
    classes: see `SCHEDULER_DEFAULTS`.

    beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2", the last without `beta_start` and `beta_end`.
    trained_betas: replace all three. snr_shift_scale: as for SD3; 1 is none.
    rescale_betas_zero_snr: the last level is pure noise.
    timestep_spacing: "leading", "linspace" or "trailing". steps_offset: added to the timesteps of "leading".
    prediction_type: what the network predicts, "epsilon" (the noise), "sample" or "v_prediction".
    set_alpha_to_one: the last step ends at clean latents, else at level 0.
    clip_sample, clip_sample_range, sample_max_value: without effect, as in diffusers' two schedulers.

    Raises:
        ValueError: a choice is none of the above, a beta is negative, or `trained_betas` are too few.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: Count = 0
    prediction_type: str = "v_prediction"
    timestep_spacing: str = "trailing"
    rescale_betas_zero_snr: bool = True
    snr_shift_scale: float = 3.0

    def __post_init__(self) -> None:
        for name, choices in _SCHEDULE_CHOICES.items():
            if getattr(self, name) not in choices:
                _refuse(name, getattr(self, name), f"one of {', '.join(choices)}")
        if min(self.beta_start, self.beta_end) < 0:
            raise ValueError(f"beta_start, beta_end: got {self.beta_start}, {self.beta_end}, want 0 or more")
        if self.trained_betas is not None and len(self.trained_betas) < self.num_train_timesteps:
            raise ValueError(
                f"trained_betas: got {len(self.trained_betas)} of them, want one for each of the "
                f"{self.num_train_timesteps} num_train_timesteps"
            )


_SCHEDULE_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
# Defaults of diffusers' classes for what a scheduler_config.json does not name, where they are not CogVideoX's.
SCHEDULER_DEFAULTS = {
    "clip_sample": True,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}


@dataclass(frozen=True)
class Condition:
    """An input beside noise and text. Its latents take channels of their own.

    name: of the call's argument that it is made of; of its function in `conditioning.CONDITION_ENCODERS`.
    channels: how many latent channels it takes.
    """

    name: str
    channels: int


@dataclass(frozen=True)
class ModelConfig:
    """A model and the defaults of a call. The entries of `CONFIGS` have what the model's authors recommend.

    repo: hub id of the official weights, or None for a shipped pack.
    height, width: pixels. num_frames: pixel frames. fps: of the written video.
    max_frames: the longest clip that the model was trained on.
    conditions: what the transformer takes on the channels after the noisy latents, in this order.
    frame_multiple: the authors' frame counts are `frame_multiple * n + 1`; others that decode exactly run too.
    dynamic_guidance: with dpm, vary the guidance by default. With ddim it varies only if the call asks for it.
    max_sequence_length: text tokens; None is the transformer's `max_text_seq_length`.
    noise_aug_strength: of the noise that is added to the pixels that a mask keeps.
    recommended: the same model with its authors' defaults; None if this one has them.
    resize: how images are fitted. follows: of `UPSTREAMS`, whose choice is the default where the two differ.
    """

    name: str
    repo: str | None
    transformer: TransformerConfig
    vae: VAEConfig
    schedule: ScheduleConfig
    height: int
    width: int
    num_frames: int
    max_frames: int
    fps: int
    dtype: str
    conditions: tuple[Condition, ...] = ()
    frame_multiple: int = 8
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    sampler: str = "dpm"
    dynamic_guidance: bool = True
    max_sequence_length: int | None = None
    noise_aug_strength: float = 0.0
    recommended: ModelConfig | None = None
    resize: str = "stretch"
    follows: str = "diffusers"

    @property
    def text_length(self) -> int:
        """Text tokens that prompts are padded or cut to."""
        return self.max_sequence_length or self.transformer.max_text_seq_length

    @property
    def tasks(self) -> list[str]:
        """The tasks that this model can do."""
        return list(_TASKS_OF.get(tuple(condition.name for condition in self.conditions), ()))

    def padding(self, num_frames: int) -> int:
        """Return how many latent frames are put in front to fill the temporal patches of 1.5. They are not decoded."""
        return -self.vae.latent_frames(num_frames) % self.transformer.patch[0]

    def latent_size(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """Return frames (padding included), height and width of the latents of a video, given in pixels."""
        stride = self.vae.spatial_compression_ratio
        frames = self.vae.latent_frames(num_frames) + self.padding(num_frames)
        return frames, height // stride, width // stride


FIRST_FRAME = Condition("image", channels=16)

_TRANSFORMER_2B = TransformerConfig()
_TRANSFORMER_5B = TransformerConfig(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
_TRANSFORMER_15 = dataclasses.replace(
    _TRANSFORMER_5B, patch_size_t=2, patch_bias=False, sample_frames=81, sample_height=300, sample_width=300
)
_VAE_5B = VAEConfig(scaling_factor=0.7)
_VAE_15 = VAEConfig(scaling_factor=0.7, invert_scale_latents=True)
_TRANSFORMER_TINY = TransformerConfig(
    num_attention_heads=3,
    num_layers=6,
    text_embed_dim=64,
    time_embed_dim=64,
    max_text_seq_length=16,
    use_rotary_positional_embeddings=True,
    sample_frames=17,
    sample_height=8,
    sample_width=8,
)
_VAE_TINY = VAEConfig(
    block_out_channels=(16, 16, 32, 64),
    layers_per_block=1,
    norm_num_groups=2,
    sample_height=64,
    sample_width=64,
    scaling_factor=1.0,  # a placeholder: the config.json of a pack has the measured value
)
_SIZE_10: dict[str, Any] = {"height": 480, "width": 720, "num_frames": 49, "max_frames": 49, "fps": 8}
_SIZE_15: dict[str, Any] = {
    "height": 768,
    "width": 1360,
    "num_frames": 81,
    "max_frames": 161,
    "fps": 16,
    "frame_multiple": 16,
    "dtype": "bfloat16",
}
_SIZE_TINY: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "max_frames": 17,
    "fps": 8,
    "dtype": "float32",  # of the arithmetic; the files are float16
    "num_inference_steps": 20,
}

CONFIGS: dict[str, ModelConfig] = {
    m.name: m
    for m in (
        ModelConfig(
            "cogvideox-2b", "zai-org/CogVideoX-2b", _TRANSFORMER_2B, VAEConfig(), ScheduleConfig(),
            dtype="float16", sampler="ddim", **_SIZE_10,
        ),
        ModelConfig(
            "cogvideox-5b", "zai-org/CogVideoX-5b", _TRANSFORMER_5B, _VAE_5B, ScheduleConfig(snr_shift_scale=1.0),
            dtype="bfloat16", **_SIZE_10,
        ),
        ModelConfig(
            "cogvideox-5b-i2v", "zai-org/CogVideoX-5b-I2V",
            dataclasses.replace(_TRANSFORMER_5B, in_channels=32, use_learned_positional_embeddings=True),
            _VAE_5B, ScheduleConfig(snr_shift_scale=1.0), dtype="bfloat16", conditions=(FIRST_FRAME,), **_SIZE_10,
        ),
        ModelConfig(
            "cogvideox1.5-5b", "zai-org/CogVideoX1.5-5B", _TRANSFORMER_15, _VAE_15,
            ScheduleConfig(snr_shift_scale=1.0), **_SIZE_15,
        ),
        ModelConfig(
            "cogvideox1.5-5b-i2v", "zai-org/CogVideoX1.5-5B-I2V",
            dataclasses.replace(_TRANSFORMER_15, in_channels=32, ofs_embed_dim=512), _VAE_15,
            ScheduleConfig(snr_shift_scale=1.0), conditions=(FIRST_FRAME,), **_SIZE_15,
        ),
        ModelConfig(
            "tiny-i2v", None, dataclasses.replace(_TRANSFORMER_TINY, in_channels=32), _VAE_TINY,
            ScheduleConfig(snr_shift_scale=1.0), conditions=(FIRST_FRAME,), guidance_scale=2.0, **_SIZE_TINY,
        ),
        ModelConfig(
            "tiny-t2v", None, _TRANSFORMER_TINY, _VAE_TINY, ScheduleConfig(snr_shift_scale=1.0), guidance_scale=2.0,
            **_SIZE_TINY,
        ),
    )
}  # fmt: skip

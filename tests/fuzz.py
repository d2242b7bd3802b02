"""Random configurations of models, samplers and calls, each drawn from its number alone.

`tests/parity/test_fuzz.py` runs them here and in diffusers. A case is data; nothing is built or run here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from references import TEXT_WIDTH, TRANSFORMER_VARIANTS

KINDS = ("transformer", "vae", "pipeline", "sampler", "pipeline", "transformer", "vae", "pipeline")
ILLEGAL_EVERY = 15  # one case in so many is illegal: coprime to the number of kinds, so that all of them get some
TASKS = {
    "2b": ("t2v", "v2v"),
    "5b": ("t2v", "v2v"),
    "5b-i2v": ("i2v",),
    "1.5-5b": ("t2v", "v2v"),
    "1.5-5b-i2v": ("i2v",),
}


@dataclass
class Case:
    """What one case builds and calls.

    transformer, vae, scheduler: options of the diffusers classes. call: arguments, most of them sizes and seeds.
    illegal: the name of what is wrong with it, in `ILLEGAL`, or None.
    """

    number: int
    kind: str
    variant: str = ""
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    illegal: str | None = None


@dataclass(frozen=True)
class Illegal:
    """Something that cogvid refuses in a ValueError of one line.

    fits: whether a case can be spoilt so. spoil: do it. message: what the refusal must match.
    readme: the words of parity/DIFFERENCES.md for it; None where diffusers fails too.
    """

    fits: Callable[[Case], bool]
    spoil: Callable[[Case, Draw], None]
    message: str
    readme: str | None = None


class Draw(random.Random):
    def chance(self, probability: float) -> bool:
        return self.random() < probability


def draw_case(number: int) -> Case:
    draw = Draw(number)
    case = Case(number, KINDS[number % len(KINDS)])
    {"transformer": _transformer, "vae": _vae, "sampler": _sampler, "pipeline": _pipeline}[case.kind](case, draw)
    if number % ILLEGAL_EVERY == ILLEGAL_EVERY - 1:
        names = [name for name, illegal in ILLEGAL.items() if illegal.fits(case)]
        case.illegal = draw.choice(names)
        ILLEGAL[case.illegal].spoil(case, draw)
    return case


def _transformer(case: Case, draw: Draw) -> None:
    case.variant = draw.choice(TRANSFORMER_VARIANTS)
    channels = draw.choice([1, 3, 4, 16])
    case.transformer = options = _transformer_options(case.variant, draw)
    options |= {"in_channels": draw.choice([channels, 2 * channels, 5]), "out_channels": channels}
    options |= {"text_embed_dim": draw.choice([7, 24, 40]), "patch_size": draw.choice([1, 2, 2, 2, 4])}
    patch, patch_t = options["patch_size"], 1
    if case.variant.startswith("1.5"):
        patch_t = options["patch_size_t"] = draw.choice([1, 2, 2, 2, 3])
    frames, height, width = draw.randint(1, 4) * patch_t, draw.randint(1, 5) * patch, draw.randint(1, 5) * patch
    if case.variant == "5b-i2v":
        height, width = (options[name] // patch * patch for name in ("sample_height", "sample_width"))
        options |= {"sample_height": height, "sample_width": width}
    free_text = case.variant not in ("2b", "5b-i2v")
    text = options["max_text_seq_length"]
    case.call = {
        "size": (draw.randint(1, 3), frames, height, width),
        "text_len": draw.randint(1, text + 3) if free_text else text,
        "timesteps": [draw.randint(0, 999) for _ in range(3)],
    }


def _transformer_options(variant: str, draw: Draw) -> dict[str, Any]:
    rotary = variant != "2b"
    # Of the 3-D tables, time takes a quarter of the channels: of a head's with rotation, of the model's without.
    head_dim = draw.choice([16, 32, 48, 64] if rotary else [8, 24, 32])
    options: dict[str, Any] = {
        "num_attention_heads": draw.choice([1, 2, 3] if rotary else [2, 4]),
        "attention_head_dim": head_dim,
        "num_layers": draw.randint(1, 3),
        "time_embed_dim": draw.choice([8, 20, 32]),
        "max_text_seq_length": draw.randint(1, 12),
        "norm_eps": draw.choice([1e-5, 1e-6, 1e-3]),
        "spatial_interpolation_scale": draw.choice([1.875, 1.0, 2.5]),
        "temporal_interpolation_scale": draw.choice([1.0, 0.5]),
        "sample_frames": draw.randint(1, 20),
        "sample_height": draw.randint(4, 9),
        "sample_width": draw.randint(4, 9),
        "patch_bias": draw.random() < 0.7,
    }
    if variant.startswith("1.5"):
        # Upstream cuts positions out of a table of this size.
        options |= {name: draw.randint(24, 40) for name in ("sample_height", "sample_width")}
    if variant == "1.5-5b-i2v":
        options["ofs_embed_dim"] = options["time_embed_dim"]
    return options


def _vae(case: Case, draw: Draw) -> None:
    case.vae = _vae_options(draw, blocks=draw.choice([2, 3, 4]))
    stride = 2 ** (len(case.vae["block_out_channels"]) - 1)
    case.call = {
        "pixels": (
            draw.randint(1, 2),
            3,
            draw.randint(1, 18),
            stride * draw.randint(1, 4),
            stride * draw.randint(1, 4),
        ),
        "latents": (
            draw.randint(1, 2),
            case.vae["latent_channels"],
            draw.randint(1, 6),
            *draw.choices(range(1, 5), k=2),
        ),
    }


def _vae_options(draw: Draw, blocks: int) -> dict[str, Any]:
    groups = draw.choice([1, 2, 4])
    return {
        "block_out_channels": tuple(groups * draw.randint(2, 5) for _ in range(blocks)),
        "down_block_types": ("CogVideoXDownBlock3D",) * blocks,
        "up_block_types": ("CogVideoXUpBlock3D",) * blocks,
        "layers_per_block": draw.choice([1, 1, 2]),
        "latent_channels": draw.choice([1, 4, 16]),
        "norm_num_groups": groups,
        "norm_eps": draw.choice([1e-6, 1e-4]),
        # One halving in each block but the last is all there is room for.
        "temporal_compression_ratio": draw.choice([ratio for ratio in (1, 2, 4, 4, 8) if ratio < 2**blocks]),
        "scaling_factor": draw.uniform(0.3, 1.5),
        "invert_scale_latents": draw.random() < 0.4,
    }


def _sampler(case: Case, draw: Draw) -> None:
    case.scheduler = _scheduler_options(draw)
    train = case.scheduler["num_train_timesteps"] = draw.choice([1000, 1000, 1000, 500, 64])
    if "trained_betas" in case.scheduler:
        case.scheduler["trained_betas"] = [draw.uniform(1e-4, 2e-2) for _ in range(train)]
    batch = draw.randint(1, 3)
    case.call = {
        "sampler": draw.choice(["dpm", "ddim"]),
        "size": (batch, 4, draw.randint(1, 3), draw.randint(1, 5), draw.randint(1, 5)),
        "steps": draw.randint(1, min(train, 120)),
        "strength": draw.choice([1.0, 1.0, draw.uniform(0.1, 1.0)]),
        "generators": draw.choice([1, batch]),
        "add_noise_at": draw.randint(0, train - 1),
    }


def _scheduler_options(draw: Draw) -> dict[str, Any]:
    start = draw.uniform(1e-4, 2e-3)
    options: dict[str, Any] = {
        "beta_start": start,
        "beta_end": start + draw.uniform(5e-3, 3e-2),
        "snr_shift_scale": draw.choice([1.0, 3.0, draw.uniform(0.3, 8.0)]),
        "rescale_betas_zero_snr": draw.random() < 0.7,
        "clip_sample": draw.random() < 0.3,  # the schedulers take it and never look at it
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    if draw.chance(0.4):
        options["timestep_spacing"] = draw.choice(["leading", "linspace"])
    if draw.chance(0.4):
        options["prediction_type"] = draw.choice(["epsilon", "sample"])
    if options["prediction_type"] == "epsilon":
        options["rescale_betas_zero_snr"] = False  # x0 from pure noise would be divided by zero
    if draw.chance(0.3):
        options["beta_schedule"] = draw.choice(["linear", "squaredcos_cap_v2"])
    if draw.chance(0.1):
        options["trained_betas"] = [draw.uniform(1e-4, 2e-2) for _ in range(1000)]
    if draw.chance(0.2):
        options["set_alpha_to_one"] = False
    if draw.chance(0.2) and options["timestep_spacing"] == "leading":
        options["steps_offset"] = 1
    return options


def _pipeline(case: Case, draw: Draw) -> None:
    case.variant = draw.choice(TRANSFORMER_VARIANTS)
    task = draw.choice(TASKS[case.variant])
    case.vae, case.scheduler = _vae_options(draw, blocks=draw.choice([3, 4, 4])), _scheduler_options(draw)
    ratio = case.vae["temporal_compression_ratio"] = draw.choice([2, 4, 4, 4])
    latent_channels = case.vae["latent_channels"]
    case.transformer = _transformer_options(case.variant, draw) | {
        "in_channels": latent_channels * (2 if task == "i2v" else 1),
        "out_channels": latent_channels,
        "text_embed_dim": TEXT_WIDTH,
        "temporal_compression_ratio": ratio,
    }
    stride = 2 ** (len(case.vae["block_out_channels"]) - 1)
    height, width = (16 * draw.randint(1, 3) for _ in range(2))
    if case.variant == "5b-i2v":
        case.transformer |= {"sample_height": height // stride, "sample_width": width // stride}
    patch_t = 1
    if case.variant.startswith("1.5"):
        patch_t = case.transformer["patch_size_t"] = draw.choice([1, 2, 2, 2])
    frames = [n for n in range(1, 18) if _decodes_to_itself(n, ratio)]
    if task == "v2v":  # upstream wants whole patches of a clip
        frames = [n for n in frames if ((n - 1) // ratio + 1) % patch_t == 0]
    prompts, per_prompt = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2])
    videos = prompts * per_prompt
    case.call = {
        "task": task,
        "sampler": draw.choice(["dpm", "ddim"]),
        "height": height,
        "width": width,
        "num_frames": draw.choice(frames),
        "num_inference_steps": draw.randint(1, 5),
        "guidance_scale": draw.choice([1.0, draw.uniform(1.0, 7.0), draw.uniform(1.0, 7.0)]),
        "use_dynamic_cfg": draw.random() < 0.5,
        "prompts": prompts,
        "videos_per_prompt": per_prompt,
        "generators": draw.choice([1, videos]),
        "negative": draw.choice(["none", "one", "each"]),
        "embeddings": draw.choice(["none", "none", "prompt", "both"]),
        "latents": task != "v2v" and draw.random() < 0.25,
        "strength": draw.uniform(0.3, 1.0),
        "output_type": draw.choice(["latent", "np", "pt"]),
        "extra_ids": 100 if draw.chance(0.3) else 0,
    }
    if task == "v2v":
        case.call["num_inference_steps"] = draw.randint(4, 6)
        if case.call["generators"] > 1 and patch_t > 1:
            # Upstream counts the clips of a batch for the frames of one.
            case.call |= {"prompts": 1, "videos_per_prompt": 1, "generators": 1}


def _decodes_to_itself(frames: int, ratio: int) -> bool:
    latent = (frames - 1) // ratio + 1
    return ratio * latent - (ratio - 1) * (latent % 2) == frames


def _is(kind: str) -> Callable[[Case], bool]:
    return lambda case: case.kind == kind


def _set(part: str, **values: Any) -> Callable[[Case, Draw], None]:
    return lambda case, _draw: getattr(case, part).update(values)


def _other_text_len(case: Case, draw: Draw) -> None:
    case.call["text_len"] += draw.choice([1, 2])


def _other_size(case: Case, draw: Draw) -> None:
    batch, frames, height, width = case.call["size"]
    case.call["size"] = (batch, frames, height + case.transformer["patch_size"] * draw.randint(1, 2), width)


def _half_a_patch(case: Case, draw: Draw) -> None:
    batch, frames, height, width = case.call["size"]
    case.call["size"] = (batch, frames, height, width + draw.randint(1, case.transformer["patch_size"] - 1))


def _odd_frames(case: Case, _draw: Draw) -> None:
    batch, frames, height, width = case.call["size"]
    case.call["size"] = (batch, frames + 1, height, width)


def _odd_pixels(case: Case, draw: Draw) -> None:
    *rest, width = case.call["pixels"]
    case.call["pixels"] = (*rest, width + draw.randint(1, 2 ** (len(case.vae["block_out_channels"]) - 1) - 1))


def _odd_height(case: Case, draw: Draw) -> None:
    case.call["height"] += draw.choice([1, 4 if len(case.vae["block_out_channels"]) < 4 else 8])


def _other_frame_count(case: Case, draw: Draw) -> None:
    ratio = case.vae["temporal_compression_ratio"]
    case.call["num_frames"] = draw.choice([n for n in range(2, 20) if not _decodes_to_itself(n, ratio)])


def _other_head_dim(case: Case, draw: Draw) -> None:
    """Without a whole number of pairs of channels for each of time, height and width."""
    case.transformer["attention_head_dim"] = draw.choice([8, 24, 40])


def _other_ofs(case: Case, draw: Draw) -> None:
    case.transformer["ofs_embed_dim"] += draw.choice([4, 8])


def _taller(case: Case, _draw: Draw) -> None:
    case.call["height"] += 16


def _one_generator_more(case: Case, _draw: Draw) -> None:
    case.call["generators"] = case.call["prompts"] * case.call["videos_per_prompt"] + 1


def _more_steps(case: Case, draw: Draw) -> None:
    case.call["steps"] = case.scheduler["num_train_timesteps"] + draw.randint(1, 9)


def _learned(case: Case) -> bool:
    return case.variant == "5b-i2v"


def _rotary(case: Case) -> bool:
    """Without a table of added positions: diffusers makes that one when it builds the model, so there is no model."""
    return case.kind == "transformer" and case.variant not in ("2b", "5b-i2v")


_SIZES, _FRAMES = "Sizes must be multiples of 16", "the frame count one that the VAE decodes"
ILLEGAL = {
    "text length": Illegal(
        lambda case: case.kind == "transformer" and case.variant in ("2b", "5b-i2v"),
        _other_text_len,
        r"^prompt_embeds: got \d+ tokens, want",
    ),
    "text width": Illegal(_is("transformer"), _set("call", text_width=9), r"^prompt_embeds: got \[\d+, \d+, 9\], want"),
    "size of the learned table": Illegal(
        lambda case: case.kind == "transformer" and _learned(case), _other_size, r"^latents: got \d+x\d+, want"
    ),
    "part of a patch": Illegal(
        lambda case: case.kind == "transformer" and case.transformer["patch_size"] > 1 and not _learned(case),
        _half_a_patch,
        r"^latents: got T, h, w = .* want",
        readme=_SIZES,
    ),
    "frames of a patch": Illegal(
        lambda case: case.kind == "transformer" and case.transformer.get("patch_size_t", 1) > 1,
        _odd_frames,
        r"^latents: got T, h, w = .* want",
    ),
    "head_dim": Illegal(_rotary, _other_head_dim, r"attention_head_dim"),
    "ofs_width": Illegal(
        lambda case: _rotary(case) and "ofs_embed_dim" in case.transformer, _other_ofs, r"ofs_embed_dim"
    ),
    "part of a latent": Illegal(_is("vae"), _odd_pixels, r"^x.* want.* multiples of \d", readme=_SIZES),
    "latent channels": Illegal(_is("vae"), _set("call", latents=(1, 17, 2, 2, 2)), r"^z.* want"),
    "steps": Illegal(_is("sampler"), _more_steps, r"^num_inference_steps: got \d+, want"),
    "size": Illegal(
        lambda case: case.kind == "pipeline" and not _learned(case),
        _odd_height,
        r"^height: got \d+, want",
        readme=_SIZES,
    ),
    "frame count": Illegal(_is("pipeline"), _other_frame_count, r"^num_frames: got \d+, want", readme=_FRAMES),
    "size of the learned table, in pixels": Illegal(
        lambda case: case.kind == "pipeline" and _learned(case), _taller, r"^height, width: got \d+x\d+, want"
    ),
    "number of generators": Illegal(_is("pipeline"), _one_generator_more, r"^generator: got a list of \d, want"),
    "prompt twice": Illegal(
        _is("pipeline"), _set("call", embeddings="twice"), r"^prompt, prompt_embeds: got both, want"
    ),
}

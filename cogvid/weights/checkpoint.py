"""Say which model a checkpoint is, from its configs and the headers of its weights.

A checkpoint has the layout that diffusers' `save_pretrained` writes: `model_index.json` and a folder for each component
with `config.json` and safetensors. weights.md lists the official ones.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cogvid.config import (
    CONFIGS,
    SCHEDULER_DEFAULTS,
    Condition,
    ModelConfig,
    ScheduleConfig,
    TransformerConfig,
    VAEConfig,
)
from cogvid.json_config import short
from cogvid.weights.files import load_state, read_json, stored_dtype
from cogvid.weights.hub import (
    BASENAME,
    CONFIG_FILES,
    WEIGHTS,
    component_directory,
    component_variants,
    find,
    packs,
    stored_variants,
)
from cogvid.weights.identity import weights_identity
from cogvid.weights.names import map_transformer_state_dict, map_vae_state_dict
from cogvid.weights.text_config import read_text_config

DEFAULTS = ("recommended", "diffusers", "sat")

PIPELINES: dict[str, tuple[str, ...]] = {  # class in model_index.json -> what its transformer is conditioned on
    "CogVideoXPipeline": (),
    "CogVideoXVideoToVideoPipeline": (),
    "CogVideoXImageToVideoPipeline": ("image",),
    "CogVideoXFunControlPipeline": ("control_video",),
    "CogVideoXFunInpaintPipeline": ("mask",),  # of VideoX-Fun
    "CogVideoX_Fun_Pipeline_Control": ("control_video",),  # the names of older versions of it
    "CogVideoX_Fun_Pipeline_Inpaint": ("mask",),
}
AUG_STRENGTH = 0.0563  # of VideoX-Fun's pipeline, for models whose config says add_noise_in_inpaint_model
CLASSES = {  # what a component may be; both schedulers keep the same settings, and the sampler is chosen by the caller
    "transformer": ("CogVideoXTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX",),
    "scheduler": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
}

# Options of upstream's classes that every checkpoint has at one value; another value would be another model.
FIXED: dict[str, dict[str, Any]] = {
    "transformer": {
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
        "attention_bias": True,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    },
    "vae": {
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "in_channels": 3,
        "out_channels": 3,
    },
}

Config = TypeVar("Config", TransformerConfig, VAEConfig, ScheduleConfig)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found.

    directory: absolute. model: what it is, with the defaults of a call. variants: of each component's weights.
    source, revision, variant, defaults: as they were asked for. hash_weights: whether `weights` has a full hash.
    """

    directory: Path
    model: ModelConfig
    variants: dict[str, str | None]
    source: str
    revision: str | None
    variant: str | None
    defaults: str
    hash_weights: bool = False

    @property
    def source_kind(self) -> str:
        """Say what the source is: a "pack", a "directory", or a repository of the "hub"."""
        if self.source in packs():
            return "pack"
        return "directory" if Path(self.source).expanduser().absolute() == self.directory else "hub"

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """Which weights these are; see `weights_identity`. Read once, when the weights are loaded."""
        return weights_identity(self.directory, self.variants, self.hash_weights)


def read_checkpoint(
    source: str | os.PathLike[str],
    *,
    defaults: str = "recommended",
    revision: str | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    hash_weights: bool = False,
) -> Checkpoint:
    """Find or fetch a checkpoint, and say which model it is. The arguments are those of `cogvid.load`."""
    if defaults not in DEFAULTS:
        raise ValueError(f"defaults: got {defaults!r}, want one of {', '.join(DEFAULTS)}")
    found = find(os.fspath(source), revision=revision, local_files_only=local_files_only, variant=variant)
    directory = found.absolute()
    index = read_model_index(directory)
    model = _read_model(directory, PIPELINES[index["_class_name"]], variant)
    if defaults == "diffusers":
        model = _with_diffusers_defaults(model, index)
    if defaults == "sat":
        model = with_sat_defaults(model)
    variants = component_variants(directory, variant)
    return Checkpoint(directory, model, variants, os.fspath(source), revision, variant, defaults, hash_weights)


def read_model_config(directory: str | Path, variant: str | None = None) -> ModelConfig:
    """Say which model a checkpoint is, from its configs and the shapes and dtype of its weights.

    An official model or a shipped pack is recognised by its architecture and has the recommended settings of `CONFIGS`.
    Those of any other checkpoint follow from its configs: the size it was made for, and the stored dtype.
    """
    directory = Path(directory)
    return _read_model(directory, PIPELINES[read_model_index(directory)["_class_name"]], variant)


def _read_model(directory: Path, conditions: tuple[str, ...], variant: str | None) -> ModelConfig:
    transformer = read_config(directory / "transformer", "transformer", TransformerConfig)
    vae = read_config(directory / "vae", "vae", VAEConfig)
    schedule = read_config(directory / "scheduler", "scheduler", ScheduleConfig)
    channels = vae.latent_channels
    if not conditions:
        # VideoX-Fun loads the parts one by one, and never reads the class that its checkpoints name.
        conditions = {2 * channels: ("control_video",), 2 * channels + 1: ("mask",)}.get(transformer.in_channels, ())
    found = tuple(Condition(name, channels + (name == "mask")) for name in conditions)
    text_width = read_text_config(directory / "text_encoder").d_model
    for what, got, wanted in (
        ("out_channels", transformer.out_channels, vae.latent_channels),
        ("in_channels", transformer.in_channels, channels + sum(each.channels for each in found)),
        ("text_embed_dim", transformer.text_embed_dim, text_width),
    ):
        if got != wanted:
            raise ValueError(f"{directory}: got a transformer with {what} {got}, want {wanted} as the other parts have")

    parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "schedule": schedule}
    same = (m for m in CONFIGS.values() if _without_size(m.transformer) == _without_size(transformer))
    known = next((m for m in same if [c.name for c in m.conditions] == list(conditions)), None)
    # 1.5 is hosted with sample sizes that are not what it was trained for.
    if known is not None and (transformer == known.transformer or transformer.patch_size_t is not None):
        return dataclasses.replace(known, **parts)
    size: dict[str, Any] = {
        "height": transformer.sample_height * vae.spatial_compression_ratio,
        "width": transformer.sample_width * vae.spatial_compression_ratio,
        "num_frames": transformer.sample_frames,
        "max_frames": transformer.sample_frames,
    }
    if known is not None:
        return dataclasses.replace(known, **parts, **size)
    folder = directory / "transformer"
    variants = stored_variants([path.name for path in folder.glob("*")], BASENAME)
    dtype = stored_dtype(load_state(folder, variant=variant if variant in variants else None), folder)
    kinds = {(): "t2v", ("image",): "i2v", ("control_video",): "control", ("mask",): "inpaint"}
    noisy = conditions == ("mask",) and read_json(folder / "config.json").get("add_noise_in_inpaint_model") is True
    return ModelConfig(
        name=f"custom-{kinds[conditions]}",
        repo=None,
        dtype=str(dtype).removeprefix("torch."),
        fps=8 if transformer.patch_size_t is None else 16,
        frame_multiple=vae.temporal_compression_ratio * 2 * transformer.patch[0],
        conditions=found,
        noise_aug_strength=AUG_STRENGTH if noisy else 0.0,
        **parts,
        **size,
    )


def _with_diffusers_defaults(model: ModelConfig, index: dict[str, Any]) -> ModelConfig:
    """Give a model the defaults that diffusers' three CogVideoX pipelines have.

    These are the scheduler of `model_index.json`, 50 steps, constant guidance of 6, 226 text tokens, the size that the
    transformer's config names, and its frame count, or 49 for image-to-video.
    """
    stride, transformer = model.vae.spatial_compression_ratio, model.transformer
    return dataclasses.replace(
        model,
        height=transformer.sample_height * stride,
        width=transformer.sample_width * stride,
        num_frames=49 if "image-to-video" in model.tasks else transformer.sample_frames,
        num_inference_steps=50,
        guidance_scale=6.0,
        sampler="dpm" if "CogVideoXDPMScheduler" in index["scheduler"] else "ddim",
        dynamic_guidance=False,
        max_sequence_length=226,
        recommended=model,
    )


def with_sat_defaults(model: ModelConfig) -> ModelConfig:
    """Give a model what the authors' own code does: its `sat/configs` and `sat/sample_video.py`.

    These are dpm with 50 steps and dynamic guidance of 6; 224 text tokens in 1.5; in 1.0 an image that is cropped; and,
    by `follows`, each option that names its choice. Sizes are those that the authors recommend.
    """
    old = model.transformer.patch_size_t is None
    return dataclasses.replace(
        model,
        num_inference_steps=50,
        guidance_scale=6.0,
        sampler="dpm",
        dynamic_guidance=True,
        max_sequence_length=model.max_sequence_length if old else 224,
        resize="crop" if old else "stretch",
        recommended=model,
        follows="sat",
    )


def load_schedule_config(source: str | Path) -> ScheduleConfig:
    """Read the noise schedule of a checkpoint; what the file does not name is the default of diffusers' class."""
    return read_config(component_directory(source, "scheduler"), "scheduler", ScheduleConfig)


def read_model_index(directory: str | Path) -> dict[str, Any]:
    """Read and check `model_index.json`: a CogVideoX pipeline with its five components."""
    path = Path(directory) / "model_index.json"
    index = read_json(path)
    if index.get("_class_name") not in tuple(PIPELINES):  # a tuple takes what cannot be hashed too
        raise ValueError(f"{path}: got class {index.get('_class_name')!s:.60}, want {' or '.join(PIPELINES)}")
    for component, classes in CLASSES.items():
        entry = index.get(component)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if name not in classes:
            raise ValueError(f"{path}: got {component} of class {name!s:.60}, want {' or '.join(classes)}")
    return index


def read_config(directory: Path, component: str, config: type[Config]) -> Config:
    """Read a component's config and refuse what cogvid does not implement."""
    path = directory / CONFIG_FILES[component]
    values = read_json(path)
    if values.get("_class_name") not in CLASSES[component]:
        raise ValueError(f"{path}: got class {values.get('_class_name')!s:.60}, want {' or '.join(CLASSES[component])}")
    for name, value in FIXED.get(component, {}).items():
        if values.get(name, value) != value:
            raise ValueError(f"{path}: {name}: got {short(values[name])}, want {value!r}: no other is implemented")
    if component == "scheduler":  # unlike the other two, upstream's defaults here are not those of CogVideoX
        values = {**SCHEDULER_DEFAULTS, **values}
    try:
        return config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _without_size(config: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(config, sample_frames=1, sample_height=config.patch_size, sample_width=config.patch_size)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say what a checkpoint is, ready for JSON; raise if its weights are not those of its configs.

    Only configs and the headers of the safetensors are read.
    """
    directory, model = checkpoint.directory, checkpoint.model
    states = {part: load_state(directory / part, base, checkpoint.variants[part]) for part, base in WEIGHTS.items()}
    on_meta = {part: {name: tensor.to("meta") for name, tensor in state.items()} for part, state in states.items()}
    map_transformer_state_dict(on_meta["transformer"], model.transformer)
    map_vae_state_dict(on_meta["vae"], model.vae)
    recommended = ("height", "width", "num_frames", "max_frames", "fps", "dtype", "num_inference_steps")
    return {
        "model": model.name,
        "official": model.repo,
        "directory": str(directory),
        "tasks": model.tasks,
        "recommended": {
            **{name: getattr(model, name) for name in recommended},
            "guidance_scale": model.guidance_scale,
            "scheduler": model.sampler,
        },
        "weights": {
            part: {
                "tensors": len(state),
                "parameters": sum(tensor.numel() for tensor in state.values()),
                "bytes": sum(tensor.nbytes for tensor in state.values()),
                "dtype": str(stored_dtype(state, directory / part)).removeprefix("torch."),
            }
            for part, state in states.items()
        },
        "config": {
            "transformer": model.transformer.to_dict(),
            "vae": model.vae.to_dict(),
            "scheduler": model.schedule.to_dict(),
        },
    }

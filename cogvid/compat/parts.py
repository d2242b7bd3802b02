"""The parts of a pipeline as diffusers names them: schedulers, transformer, VAE; and the weights behind them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from cogvid.config import SCHEDULER_DEFAULTS, ScheduleConfig, TransformerConfig, VAEConfig
from cogvid.models.vae import DiagonalGaussian
from cogvid.options import check_choice
from cogvid.run.pipeline import Pipeline
from cogvid.weights.checkpoint import load_schedule_config, read_config
from cogvid.weights.files import load_state, read_json, stored_dtype
from cogvid.weights.hub import CONFIG_FILES, component_directory
from cogvid.weights.load import make_transformer, make_vae
from cogvid.weights.load_options import LOAD_OPTIONS
from cogvid.weights.placement import resolve_placement


class Config(dict[str, Any]):
    """A component's config; its values are items and attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config: got the name {name!r}, want one of {', '.join(self)}") from None


class Scheduler:
    """The settings of a noise schedule. The steps are made when a pipeline runs; `sampler` takes them."""

    sampler: ClassVar[str]

    def __init__(self, **settings: Any) -> None:
        """Take the settings of diffusers' class, by its names and with its defaults."""
        names = [field.name for field in dataclasses.fields(ScheduleConfig)]
        for name in settings:
            check_choice("scheduler", name, names)
        self.schedule = ScheduleConfig.from_dict({**SCHEDULER_DEFAULTS, **settings})
        self.config = Config(_class_name=type(self).__name__, **self.schedule.to_dict())

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """Make a scheduler of the settings of another one, with changes."""
        names = [field.name for field in dataclasses.fields(ScheduleConfig)]
        return cls(**{**{name: config[name] for name in names if name in config}, **changes})

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], subfolder: str = "scheduler", **changes: Any) -> Self:
        """Read the settings of a checkpoint, or of the scheduler's own directory. subfolder: "scheduler"."""
        check_choice("subfolder", subfolder, ("scheduler",))
        return cls.from_config(load_schedule_config(os.fspath(source)).to_dict(), **changes)


class CogVideoXDPMScheduler(Scheduler):
    """DPM-Solver++, the sampler "dpm"."""

    sampler = "dpm"


class CogVideoXDDIMScheduler(Scheduler):
    """DDIM, the sampler "ddim"."""

    sampler = "ddim"


SCHEDULERS: dict[str, type[Scheduler]] = {
    each.sampler: each for each in (CogVideoXDPMScheduler, CogVideoXDDIMScheduler)
}

_HUB = "the environment of huggingface_hub (HF_HOME, HF_TOKEN)"
INSTEAD = {  # what a script of the family may call that has no meaning here -> what to do
    "cache_dir": _HUB,
    "force_download": _HUB,
    "proxies": _HUB,
    "token": _HUB,
    "custom_pipeline": "cogvid.load and its seams (SAMPLERS, GUIDANCE, Ops)",
    "device_map": "a device, such as 'cuda', or enable_model_cpu_offload()",
    "quantization_config": "from_pretrained(..., quantize=...)",
    "enable_attention_slicing": "nothing: attention never holds all logits",
    "enable_freeu": "nothing: these models have no U-Net",
    "enable_layerwise_casting": "from_pretrained(..., quantize='fp8-storage')",
    "enable_xformers_memory_efficient_attention": "nothing: attention never holds all logits",
    "enable_cache": "step_cache= of the pipeline of cogvid.load",
    "fuse_qkv_projections": "nothing: Q, K and V stay three projections, as they are stored",
    "lora": "load_lora_weights()",
    "load_textual_inversion": "a longer prompt, or prompt_embeds",
    "save_lora_weights": "the file that the adapter was loaded from",
    "save_pretrained": "cogvid.weights.load.save_transformer and save_vae",
    "set_attention_backend": "from_pretrained(..., ops=...)",
}


class Weights:
    """Parts of a checkpoint that are loaded when they are first used, with the options that are known by then.

    folders: of each part. source: takes the options and returns an object that has the parts as attributes.
    """

    def __init__(self, folders: Mapping[str, Path], source: Callable[..., Any], **options: Any) -> None:
        self.folders = dict(folders)
        self.source = source
        self.scales: dict[str, float] = {}  # of adapters, by name
        self.active: list[str] = []  # those that have an effect
        self.options: dict[str, Any] = {}
        self._loaded, self._lent = None, False
        self.set(**options)

    def set(self, **options: Any) -> None:
        """Change options of the load; what is loaded already is loaded again."""
        changed = {name: value for name, value in options.items() if self.options.get(name) != value}
        if self._lent and changed:
            name, value = next(iter(changed.items()))
            raise ValueError(f"{name}: got {value!r:.60} after the modules were handed out, want it before")
        resolve_placement(**{**self.options, **changed})  # now, so that an error comes with the call that caused it
        if self._loaded is not None and changed and isinstance(self._loaded, Pipeline):
            changed["lora"] = list(self._loaded.placement.lora)
        self.options |= changed
        if changed:
            self._loaded = None

    def get(self, *, lend: bool = False) -> Any:
        """Return what is loaded. lend: the caller may change it, so that it must not be loaded again."""
        if self._loaded is None:
            self._loaded = self.source(**self.options)
        self._lent = self._lent or lend
        return self._loaded


class Part:
    """One part of a checkpoint: of a pipeline, or alone."""

    name: ClassVar[str]

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: Any = None,
        variant: str | None = None,
        **options: Any,
    ) -> Self:
        """Take a part of a checkpoint, or of its own directory. options: `LoadOptions`, such as `quantize`."""
        if subfolder is not None:
            check_choice("subfolder", subfolder, (cls.name,))
        folder = component_directory(os.fspath(source), cls.name, variant)
        options = load_options(torch_dtype=torch_dtype, **options)
        return cls(Weights({cls.name: folder}, lambda **given: cls._load(folder, variant, given), **options))

    @classmethod
    def _load(cls, folder: Path, variant: str | None, options: dict[str, Any]) -> Any:
        kind, make = (TransformerConfig, make_transformer) if cls.name == "transformer" else (VAEConfig, make_vae)
        config: Any = read_config(folder, cls.name, kind)  # pyright: ignore[reportArgumentType]
        state = load_state(folder, variant=variant)
        place = resolve_placement(**options)(str(stored_dtype(state, folder)).removeprefix("torch."))
        return SimpleNamespace(**{cls.name: make(config, state, place, folder)})

    @property
    def folder(self) -> Path:
        return self.weights.folders[self.name]

    @property
    def config(self) -> Config:
        """The config, with upstream's names."""
        values: dict[str, Any] = read_json(self.folder / CONFIG_FILES[self.name])
        kinds = {"transformer": TransformerConfig, "vae": VAEConfig}
        parsed = read_config(self.folder, self.name, kinds[self.name]).to_dict() if self.name in kinds else {}
        return Config({**parsed, **values})

    @property
    def module(self) -> Any:
        """The module of cogvid. Load options cannot be changed once it was asked for."""
        return getattr(self.weights.get(lend=True), self.name)

    @property
    def device(self) -> torch.device:
        return torch.device(self.weights.options["device"])

    @property
    def dtype(self) -> torch.dtype:
        return resolve_placement(**self.weights.options)("float32").dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Run on another device or in another dtype; all parts of a pipeline go together."""
        self.weights.set(**device_dtype(*args, **kwargs))
        return self

    def __getattr__(self, name: str) -> Any:
        raise unknown(name, "`module`, which is cogvid's own")


class CogVideoXTransformer3DModel(Part):
    """The transformer of a checkpoint; `module` is a `cogvid.models.transformer.Transformer`."""

    name = "transformer"


class T5(Part):
    """The text encoder of a checkpoint; `module` is a `cogvid.models.text.TextEncoder`."""

    name = "text_encoder"


class T5Tokenizer(Part):
    """The tokenizer of a checkpoint; `module` is a `cogvid.media.tokenizer.Tokenizer`."""

    name = "tokenizer"

    @property
    def module(self) -> Any:
        return self.weights.get(lend=True).text_encoder.tokenizer


class AutoencoderKLCogVideoX(Part):
    """The VAE of a checkpoint; `module` is a `cogvid.models.vae.VAE`."""

    name = "vae"

    def enable_tiling(self, **sizes: Any) -> None:
        """Work on tiles of diffusers' default size: less memory, other pixels."""
        for name, value in sizes.items():
            if value is not None:
                raise ValueError(f"{name}: got {value}, want None: tiles have diffusers' default sizes")
        self.weights.set(vae_tiling=True)

    def disable_tiling(self) -> None:
        self.weights.set(vae_tiling=False)

    def enable_slicing(self) -> None:
        """Nothing to do: a pipeline always encodes and decodes one video at a time."""

    def disable_slicing(self) -> None:
        """As `enable_slicing`."""

    @torch.no_grad()
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode `[B, 3, F, H, W]` in [-1, 1]; `.latent_dist` or `[0]` is a distribution of unscaled latents."""
        latents = _Distribution(getattr(self.weights.get(), self.name).encode(x))
        return Result(latent_dist=latents) if return_dict else (latents,)

    @torch.no_grad()
    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decode unscaled latents `[B, C, T, h, w]`; `.sample` or `[0]` is `[B, 3, F, H, W]`, about [-1, 1]."""
        pixels = getattr(self.weights.get(), self.name).decode(z)
        return Result(sample=pixels) if return_dict else (pixels,)


class _Distribution:
    """A `DiagonalGaussian` with diffusers' method for its mode."""

    def __init__(self, latents: DiagonalGaussian) -> None:
        self.mean, self.logvar, self.std, self.sample = latents.mean, latents.logvar, latents.std, latents.sample

    def mode(self) -> Tensor:
        return self.mean


class Result:
    """One value under a name; `[0]`, the name as an item and `to_tuple` work too, as on diffusers' outputs."""

    def __init__(self, **value: Any) -> None:
        [(self._name, self._value)] = value.items()
        setattr(self, self._name, self._value)

    def __getitem__(self, key: int | str) -> Any:
        return {self._name: self._value}[key] if isinstance(key, str) else (self._value,)[key]

    def to_tuple(self) -> tuple[Any]:
        return (self._value,)


class CogVideoXPipelineOutput(Result):
    """What a pipeline returns: `frames`, by `output_type` lists of PIL images, an array, or a tensor."""


PARTS: dict[str, type[Part]] = {
    part.name: part for part in (CogVideoXTransformer3DModel, AutoencoderKLCogVideoX, T5, T5Tokenizer)
}


def unknown(name: str, otherwise: str) -> AttributeError:
    """Return the error for a name that is not here."""
    return AttributeError(f"{name}: got a name without a meaning here, want {INSTEAD.get(name, otherwise)}")


def load_options(
    *, torch_dtype: Any = None, dtype: Any = None, device_map: Any = None, **options: Any
) -> dict[str, Any]:
    """Return the load options that follow from those of a `from_pretrained`: float32 on the CPU by default.

    Raises:
        ValueError: an option that has no meaning here.
    """
    dtype = torch_dtype if dtype is None else dtype
    if isinstance(dtype, Mapping):
        raise ValueError("torch_dtype: got one for each part, want one for all")
    if device_map is not None:
        options["device"] = device_map
    if device_map is not None and str(device_map).partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device_map: got {device_map!r:.60}, want {INSTEAD['device_map']}")
    for name, only in (("use_safetensors", (True, None)), ("low_cpu_mem_usage", (True,))):  # what is done anyway
        if (value := options.pop(name, only[0])) not in only:
            raise ValueError(f"{name}: got {value!r:.60}, want True")
    for name in options:
        if name in INSTEAD or name not in LOAD_OPTIONS:
            raise ValueError(f"{name}: got an option without a meaning here, want {_instead(name)}")
    return {"device": "cpu", "dtype": torch.float32 if dtype is None else dtype, **options}


def _instead(name: str) -> str:
    return INSTEAD.get(name) or f"one of torch_dtype, {', '.join(LOAD_OPTIONS)}"


def device_dtype(*args: Any, device: Any = None, dtype: Any = None) -> dict[str, Any]:
    """Return the load options that the arguments of a `to` name."""
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        else:
            device = value
    device = f"cuda:{device}" if isinstance(device, int) else device
    return {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}

"""Say which model a checkpoint is, and load it; and the way back, for diffusers to read.

A checkpoint has the layout that diffusers' `save_pretrained` writes: `model_index.json` and a folder for each component
with `config.json` and safetensors, in one file or in several with an index. weights.md lists the official ones.

Nothing is read into memory that need not be. Modules are built on the meta device, safetensors are mapped, and where
neither device nor dtype changes the parameters are the mapping itself: pages that the kernel reads when they are first
used and may drop again.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cogvid.config import (
    CONFIGS,
    SCHEDULER_CLASS_DEFAULTS,
    ModelConfig,
    SchedulerConfig,
    TransformerConfig,
    VAEConfig,
)
from cogvid.hub import BASENAME, CONFIG_FILES, component_directory, stored_variants, weight_files
from cogvid.ops import Ops, resolve_ops
from cogvid.transformer import Transformer
from cogvid.vae import VAE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOAT64 = "patch_embed.pos_embedding"  # diffusers writes this table in float64, whatever it was loaded from

# Upstream's module -> ours, one to one; `{}` is the number of a layer, and `.weight` and `.bias` come along.
TRANSFORMER_NAMES = {
    "patch_embed.pos_embedding": "pos_embedding",
    "patch_embed.proj": "patch_proj",
    "patch_embed.text_proj": "text_proj",
    "time_embedding.linear_1": "time_embed.linear_in",
    "time_embedding.linear_2": "time_embed.linear_out",
    "ofs_embedding.linear_1": "ofs_embed.linear_in",
    "ofs_embedding.linear_2": "ofs_embed.linear_out",
    "transformer_blocks.{}.norm1.linear": "blocks.{}.modulation1",
    "transformer_blocks.{}.norm1.norm": "blocks.{}.norm1",
    "transformer_blocks.{}.attn1.to_q": "blocks.{}.q_proj",
    "transformer_blocks.{}.attn1.to_k": "blocks.{}.k_proj",
    "transformer_blocks.{}.attn1.to_v": "blocks.{}.v_proj",
    "transformer_blocks.{}.attn1.norm_q": "blocks.{}.q_norm",
    "transformer_blocks.{}.attn1.norm_k": "blocks.{}.k_norm",
    "transformer_blocks.{}.attn1.to_out.0": "blocks.{}.out",
    "transformer_blocks.{}.norm2.linear": "blocks.{}.modulation2",
    "transformer_blocks.{}.norm2.norm": "blocks.{}.norm2",
    "transformer_blocks.{}.ff.net.0.proj": "blocks.{}.mlp_in",
    "transformer_blocks.{}.ff.net.2": "blocks.{}.mlp_out",
    "norm_final": "norm_final",
    "norm_out.linear": "modulation_out",
    "norm_out.norm": "norm_out",
    "proj_out": "proj_out",
}
VAE_NAMES = {
    "encoder.conv_in.conv": "encoder.conv_in",
    "encoder.down_blocks.{}.resnets.{}.norm1": "encoder.down_blocks.{}.resnets.{}.norm1",
    "encoder.down_blocks.{}.resnets.{}.conv1.conv": "encoder.down_blocks.{}.resnets.{}.conv1",
    "encoder.down_blocks.{}.resnets.{}.norm2": "encoder.down_blocks.{}.resnets.{}.norm2",
    "encoder.down_blocks.{}.resnets.{}.conv2.conv": "encoder.down_blocks.{}.resnets.{}.conv2",
    "encoder.down_blocks.{}.resnets.{}.conv_shortcut": "encoder.down_blocks.{}.resnets.{}.conv_shortcut",
    "encoder.down_blocks.{}.downsamplers.0.conv": "encoder.down_blocks.{}.downsample",
    "encoder.mid_block.resnets.{}.norm1": "encoder.mid_block.resnets.{}.norm1",
    "encoder.mid_block.resnets.{}.conv1.conv": "encoder.mid_block.resnets.{}.conv1",
    "encoder.mid_block.resnets.{}.norm2": "encoder.mid_block.resnets.{}.norm2",
    "encoder.mid_block.resnets.{}.conv2.conv": "encoder.mid_block.resnets.{}.conv2",
    "encoder.norm_out": "encoder.norm_out",
    "encoder.conv_out.conv": "encoder.conv_out",
    "decoder.conv_in.conv": "decoder.conv_in",
    "decoder.mid_block.resnets.{}.norm1.norm_layer": "decoder.mid_block.resnets.{}.norm1",
    "decoder.mid_block.resnets.{}.norm1.conv_y.conv": "decoder.mid_block.resnets.{}.norm1.scale",
    "decoder.mid_block.resnets.{}.norm1.conv_b.conv": "decoder.mid_block.resnets.{}.norm1.shift",
    "decoder.mid_block.resnets.{}.conv1.conv": "decoder.mid_block.resnets.{}.conv1",
    "decoder.mid_block.resnets.{}.norm2.norm_layer": "decoder.mid_block.resnets.{}.norm2",
    "decoder.mid_block.resnets.{}.norm2.conv_y.conv": "decoder.mid_block.resnets.{}.norm2.scale",
    "decoder.mid_block.resnets.{}.norm2.conv_b.conv": "decoder.mid_block.resnets.{}.norm2.shift",
    "decoder.mid_block.resnets.{}.conv2.conv": "decoder.mid_block.resnets.{}.conv2",
    "decoder.up_blocks.{}.resnets.{}.norm1.norm_layer": "decoder.up_blocks.{}.resnets.{}.norm1",
    "decoder.up_blocks.{}.resnets.{}.norm1.conv_y.conv": "decoder.up_blocks.{}.resnets.{}.norm1.scale",
    "decoder.up_blocks.{}.resnets.{}.norm1.conv_b.conv": "decoder.up_blocks.{}.resnets.{}.norm1.shift",
    "decoder.up_blocks.{}.resnets.{}.conv1.conv": "decoder.up_blocks.{}.resnets.{}.conv1",
    "decoder.up_blocks.{}.resnets.{}.norm2.norm_layer": "decoder.up_blocks.{}.resnets.{}.norm2",
    "decoder.up_blocks.{}.resnets.{}.norm2.conv_y.conv": "decoder.up_blocks.{}.resnets.{}.norm2.scale",
    "decoder.up_blocks.{}.resnets.{}.norm2.conv_b.conv": "decoder.up_blocks.{}.resnets.{}.norm2.shift",
    "decoder.up_blocks.{}.resnets.{}.conv2.conv": "decoder.up_blocks.{}.resnets.{}.conv2",
    "decoder.up_blocks.{}.resnets.{}.conv_shortcut": "decoder.up_blocks.{}.resnets.{}.conv_shortcut",
    "decoder.up_blocks.{}.upsamplers.0.conv": "decoder.up_blocks.{}.upsample",
    "decoder.norm_out.norm_layer": "decoder.norm_out",
    "decoder.norm_out.conv_y.conv": "decoder.norm_out.scale",
    "decoder.norm_out.conv_b.conv": "decoder.norm_out.shift",
    "decoder.conv_out.conv": "decoder.conv_out",
}

PIPELINES = {  # class in model_index.json -> whether its transformer takes an image
    "CogVideoXPipeline": False,
    "CogVideoXVideoToVideoPipeline": False,
    "CogVideoXImageToVideoPipeline": True,
}
CLASSES = {  # what a component may be; both schedulers keep the same settings, and the sampler is chosen by the caller
    "transformer": ("CogVideoXTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX",),
    "scheduler": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
}

# What upstream's classes can be set to and no checkpoint changes; another value would be another model.
_FIXED: dict[str, dict[str, Any]] = {
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

Config = TypeVar("Config", TransformerConfig, VAEConfig, SchedulerConfig)


def load_transformer(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    ops: str | Ops = "auto",
    variant: str | None = None,
) -> Transformer:
    """Load the transformer of a checkpoint, or the one in its own directory.

    Args:
        model: as for `find`, or a directory that holds the transformer's own config.json.
        dtype: float32, float16 or bfloat16, as a name or a `torch.dtype`; None is the stored one. What a CPU is slow at
            is replaced, with a warning: see `resolve_dtype`.
        ops: "auto", "torch", "triton" or an `Ops`.
        variant: which of several sets of weights to load, by the infix of its files' names, such as "fp16".

    Raises:
        ValueError: the files are missing, broken or not this model's; an argument is not one of the above.
    """
    directory = component_directory(model, "transformer", variant)
    bundle, _ = resolve_ops(ops, resolve_device(device))
    with torch.device("meta"), _WithoutInit():
        module = Transformer(_read_config(directory, "transformer", TransformerConfig), bundle)
    return _fill(module, directory, device, dtype, variant)


def load_vae(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    ops: str | Ops = "auto",
    variant: str | None = None,
) -> VAE:
    """Load the VAE of a checkpoint, or the one in its own directory; arguments as for `load_transformer`."""
    directory = component_directory(model, "vae", variant)
    bundle, _ = resolve_ops(ops, resolve_device(device))
    with torch.device("meta"), _WithoutInit():
        module = VAE(_read_config(directory, "vae", VAEConfig), bundle)
    return _fill(module, directory, device, dtype, variant)


def load_scheduler_config(model: str | Path) -> SchedulerConfig:
    """Read the noise schedule of a checkpoint; what the file does not name is the default of diffusers' class."""
    return _read_config(component_directory(model, "scheduler"), "scheduler", SchedulerConfig)


def save_transformer(module: Transformer, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and the safetensors that `CogVideoXTransformer3DModel.from_pretrained` reads.

    dtype: of the file; None keeps the module's.
    """
    config = module.config.to_dict()
    del config["qk_norm_eps"]  # upstream has it in its code
    _save(module, "transformer", config, Path(directory), dtype)


def save_vae(module: VAE, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and the safetensors that `AutoencoderKLCogVideoX.from_pretrained` reads."""
    blocks = len(module.config.block_out_channels)
    types = {"down_block_types": ["CogVideoXDownBlock3D"] * blocks, "up_block_types": ["CogVideoXUpBlock3D"] * blocks}
    _save(module, "vae", {**module.config.to_dict(), **types}, Path(directory), dtype)


def map_transformer_state_dict(state: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Rename a state dict of `CogVideoXTransformer3DModel` for `Transformer`.

    Raises:
        ValueError: names or shapes are not those of the config.
    """
    with torch.device("meta"):
        module = Transformer(config)
    return _map(state, module, "state dict")


def map_vae_state_dict(state: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """Rename a state dict of `AutoencoderKLCogVideoX` for `VAE`; errors as for `map_transformer_state_dict`."""
    with torch.device("meta"):
        module = VAE(config)
    return _map(state, module, "state dict")


def unmap_state_dict(module: Transformer | VAE) -> dict[str, Tensor]:
    """Return the module's state dict under upstream's names and shapes: the inverse of the two functions above."""
    state = module.state_dict()
    return {name: state[key].reshape(shape) for key, (name, shape) in _upstream(module).items()}


def _upstream(module: Transformer | VAE) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each key of the module's state dict, its upstream name and the shape it has there."""
    table = TRANSFORMER_NAMES if isinstance(module, Transformer) else VAE_NAMES
    names = {ours: theirs for theirs, ours in table.items()}
    expected = {key: (_rename(key, names), tuple(tensor.shape)) for key, tensor in module.state_dict().items()}
    if isinstance(module, Transformer) and module.config.patch_size_t is None:
        # Upstream's 1.0 has a convolution here, whose flattened kernel is the matrix of the same patches.
        config, (name, shape) = module.config, expected["patch_proj.weight"]
        expected["patch_proj.weight"] = name, (shape[0], config.in_channels, config.patch_size, config.patch_size)
    return expected


def _rename(key: str, names: Mapping[str, str]) -> str:
    """Rename the key of a parameter; `names` has modules, with `{}` for the numbers of layers."""
    module, dot, kind = key.rpartition(".")
    if kind not in ("weight", "bias"):
        module, dot, kind = key, "", ""
    parts = module.split(".")
    row = ".".join("{}" if part.isdigit() else part for part in parts)
    return names[row].format(*(part for part in parts if part.isdigit())) + dot + kind


def _map(state: Mapping[str, Tensor], module: Transformer | VAE, source: str | Path) -> dict[str, Tensor]:
    """Rename `state` for `module`; nothing is copied."""
    expected = _upstream(module)
    _check_names(state, dict(expected.values()), source)
    mapped = {key: state[name] for key, (name, _) in expected.items()}
    if isinstance(module, Transformer):
        mapped["patch_proj.weight"] = mapped["patch_proj.weight"].flatten(1)
    return mapped


def _check_names(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str | Path) -> None:
    """Raise one line that lists what is missing, unexpected or of the wrong shape, with the nearest names."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [(n, tuple(state[n].shape), s) for n, s in expected.items() if n in state and tuple(state[n].shape) != s]
    faults = [
        _listing("missing", missing, lambda n: f"{n}{_nearest(n, unexpected)}"),
        _listing("unexpected", unexpected, lambda n: f"{n}{_nearest(n, missing or list(expected))}"),
        _listing("of another shape", shapes, lambda s: f"{s[0]} is {list(s[1])}, wanted {list(s[2])}"),
    ]
    if any(faults):
        raise ValueError(f"{source}: the weights do not fit the config: {'; '.join(f for f in faults if f)}")


def _listing(what: str, items: list[Any], describe: Callable[[Any], str], limit: int = 3) -> str:
    if not items:
        return ""
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return f"{len(items)} {what} ({', '.join(describe(item) for item in items[:limit])}{more})"


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" [nearest: {close[0]}]" if close else ""


class _WithoutInit(TorchFunctionMode):
    """Skip the initialisation of linears and convolutions, which takes a quarter of the time of a load on meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in _INIT else func(*args, **kwargs)


_INIT = (nn.init.kaiming_uniform_, nn.init.uniform_)

Module = TypeVar("Module", Transformer, VAE)


def _fill(
    module: Module, directory: Path, device: str | torch.device, dtype: str | torch.dtype | None, variant: str | None
) -> Module:
    """Give a module on the meta device the weights of a directory."""
    state = load_state(directory, variant=variant)
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device, stored=stored_dtype(state, directory))
    mapped = {key: tensor.to(device, dtype) for key, tensor in _map(state, module, directory).items()}
    module.load_state_dict(mapped, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def load_state(directory: Path, basename: str = BASENAME, variant: str | None = None) -> dict[str, Tensor]:
    """Map the tensors of `basename.safetensors`, or of the shards that `basename.safetensors.index.json` names.

    Nothing is read but the headers; a tensor's pages are read when it is used. `hub.weight_files` has the names of a
    variant.

    Raises:
        ValueError: a file is missing or broken, is there in other variants alone, or holds what are no weights.
    """
    names = [path.name for path in directory.glob("*") if path.is_file()]
    first, *_ = weight_files(names, basename, variant, directory) or [f"{basename}.safetensors"]
    if not first.endswith(".json"):
        return _map_file(directory / first)
    index = directory / first
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shard_of.values()):
        raise ValueError(f"{index}: wanted a 'weight_map' of tensor names to file names")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        # A tensor that the index gives to another shard is that shard's; one the index leaves out is kept, to be named.
        state |= {k: v for k, v in _map_file(directory / shard).items() if shard_of.get(k, shard) == shard}
    if absent := [name for name in shard_of if name not in state]:
        raise ValueError(f"{index}: {_listing('tensors not in the shard it names', absent, str)}")
    return state


def _map_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".safetensors", ".bin", ".pt"))
        raise ValueError(f"{path}: no such file{'; there is ' + ', '.join(there[:3]) if there else ''}")
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    foreign = [
        (name, tensor.dtype)
        for name, tensor in state.items()
        if tensor.dtype not in DTYPES.values() and (name, tensor.dtype) != (_FLOAT64, torch.float64)
    ]
    if foreign:
        listed = _listing("tensors", foreign, lambda item: f"{item[0]} is {str(item[1]).removeprefix('torch.')}")
        raise ValueError(f"{path}: got {listed}, want weights in {', '.join(DTYPES)} alone")
    return state


def stored_dtype(state: Mapping[str, Tensor], source: str | Path) -> torch.dtype:
    """Return the dtype that most of the weights are stored in."""
    count: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.dtype in DTYPES.values():  # all but the one table that may be float64
            count[tensor.dtype] += tensor.numel()
    if not count:
        raise ValueError(f"{source}: no weights in it")
    return count.most_common(1)[0][0]


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype to run in: the one asked for or else the stored one; on a CPU, not one that is very slow there.

    On a CPU, float16 becomes bfloat16, or float32 where bfloat16 is slow too. Where it is slow, a model stored in
    bfloat16 becomes float32, but bfloat16 that the caller asked for, to save memory, is kept. Each is warned of.
    """
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else stored if dtype is None else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype: got {dtype!r}, wanted {', '.join(DTYPES)}")
    if device.type != "cpu" or chosen == torch.float32:
        return chosen
    fast = _cpu_has_bfloat16()
    if chosen == torch.float16:
        name = "bfloat16" if fast else "float32"
        warnings.warn(
            f"float16 arithmetic is not run on a CPU: running in {name} instead"
            + ("" if fast else ", which takes twice the memory"),
            stacklevel=2,
        )
        return DTYPES[name]
    if not fast and dtype is None:
        warnings.warn(
            "bfloat16 is slow on this CPU, which has no instructions for it: running in float32 instead, which takes "
            "twice the memory; dtype='bfloat16' runs it all the same",
            stacklevel=2,
        )
        return torch.float32
    if not fast:
        _warn_of_slow_bfloat16()
    return chosen


@functools.cache  # said once, not by each part of a model that is loaded as asked
def _warn_of_slow_bfloat16() -> None:
    warnings.warn("bfloat16 is slow on this CPU, which has no instructions for it; float32 is faster", stacklevel=3)


def _cpu_has_bfloat16() -> bool:
    """Say whether PyTorch hands bfloat16 products and convolutions to oneDNN on this CPU; its own loops are slow.

    This is the question that PyTorch itself asks: for AVX-512 on x86, for BF16 on ARM. Limits of the environment
    (ONEDNN_MAX_CPU_ISA) count. It has no public name; where it is gone, the answer is no.
    """
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(ask is not None and ask())


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device, which must be a CPU or a CUDA GPU that is there."""
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(device)!r}, wanted 'cpu', 'cuda' or 'cuda:N'")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {str(device)!r}, but PyTorch sees {torch.cuda.device_count()} CUDA GPUs here")
    return resolved


def _save(
    module: Transformer | VAE,
    component: str,
    config: dict[str, Any],
    directory: Path,
    dtype: torch.dtype | None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: x.to("cpu", dtype).contiguous() for name, x in unmap_state_dict(module).items()}
    _write(directory / f"{BASENAME}.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    text = json.dumps({"_class_name": CLASSES[component][0], **_FIXED[component], **config}, indent=2) + "\n"
    _write(directory / "config.json", lambda path: path.write_text(text))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place: it appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted a JSON object")
    return values


def _read_config(directory: Path, component: str, config: type[Config]) -> Config:
    """Read a component's config and refuse what cogvid does not implement."""
    path = directory / CONFIG_FILES[component]
    values = _read_json(path)
    if values.get("_class_name") not in CLASSES[component]:
        raise ValueError(f"{path}: is of class {values.get('_class_name')}, wanted {' or '.join(CLASSES[component])}")
    for name, value in _FIXED.get(component, {}).items():
        if values.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {values[name]!r}; only {value!r} is implemented")
    if component == "scheduler":  # unlike the other two, upstream's defaults here are not those of CogVideoX
        values = {**SCHEDULER_CLASS_DEFAULTS, **values}
    try:
        return config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_model_index(directory: str | Path) -> dict[str, Any]:
    """Read and check `model_index.json`: a CogVideoX pipeline with its five components."""
    path = Path(directory) / "model_index.json"
    index = _read_json(path)
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(f"{path}: is of class {index.get('_class_name')}, wanted {' or '.join(PIPELINES)}")
    for component, classes in CLASSES.items():
        entry = index.get(component)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if name not in classes:
            raise ValueError(f"{path}: {component} is of class {name}, wanted {' or '.join(classes)}")
    return index


def read_model_config(directory: str | Path, variant: str | None = None) -> ModelConfig:
    """Say which model a checkpoint is, from its configs and the shapes and dtype of its weights.

    An official model or a shipped pack is told by its architecture; its recommended settings are those of `CONFIGS`.
    Of any other checkpoint they follow from the configs: the size it was made for, and the stored dtype.
    """
    directory = Path(directory)
    pipeline = read_model_index(directory)["_class_name"]
    transformer = _read_config(directory / "transformer", "transformer", TransformerConfig)
    vae = _read_config(directory / "vae", "vae", VAEConfig)
    scheduler = _read_config(directory / "scheduler", "scheduler", SchedulerConfig)
    text_width = _read_json(directory / "text_encoder" / "config.json").get("d_model")
    for what, got, wanted in (
        ("out_channels", transformer.out_channels, vae.latent_channels),
        ("in_channels", transformer.in_channels, vae.latent_channels * (1 + PIPELINES[pipeline])),
        ("text_embed_dim", transformer.text_embed_dim, text_width),
    ):
        if got != wanted:
            raise ValueError(
                f"{directory}: the transformer's {what} is {got}, but {wanted} goes with the other components "
                f"of this {pipeline}"
            )

    parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    known = next((m for m in CONFIGS.values() if _without_size(m.transformer) == _without_size(transformer)), None)
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
    found = stored_variants([path.name for path in folder.glob("*")], BASENAME)
    dtype = stored_dtype(load_state(folder, variant=variant if variant in found else None), folder)
    return ModelConfig(
        name="custom-i2v" if transformer.takes_image else "custom-t2v",
        repo=None,
        dtype=str(dtype).removeprefix("torch."),
        fps=8 if transformer.patch_size_t is None else 16,
        frame_multiple=vae.temporal_compression_ratio * 2 * (transformer.patch_size_t or 1),
        **parts,
        **size,
    )


def _without_size(config: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(config, sample_frames=1, sample_height=config.patch_size, sample_width=config.patch_size)

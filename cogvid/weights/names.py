"""Upstream's names of modules and ours, and state dicts mapped from one to the other."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cogvid.config import TransformerConfig, VAEConfig
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.weights.files import listing

# Upstream's module -> ours, one to one; `{}` is the number of a layer. `.weight` and `.bias` keep their names.
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


@contextlib.contextmanager
def on_meta(source: str | Path) -> Iterator[None]:
    """Build a module without storage. Sizes that no storage has are a `ValueError`; source: names them in it."""
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, OverflowError, TypeError) as error:  # a number of elements beyond 63 bits
        raise ValueError(f"{source}: got sizes beyond any memory ({error!s:.100}), want those of a model") from error


def map_transformer_state_dict(state: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Rename a state dict of `CogVideoXTransformer3DModel` for `Transformer`.

    Raises:
        ValueError: names or shapes are not those of the config.
    """
    with on_meta("state dict"):
        module = Transformer(config)
    return map_state(state, module, "state dict")


def map_vae_state_dict(state: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """Rename a state dict of `AutoencoderKLCogVideoX` for `VAE`; errors as for `map_transformer_state_dict`."""
    with on_meta("state dict"):
        module = VAE(config)
    return map_state(state, module, "state dict")


def unmap_state_dict(module: Transformer | VAE) -> dict[str, Tensor]:
    """Return the module's state dict under upstream's names and shapes: the inverse of the two functions above."""
    state = module.state_dict()
    return {name: state[key].reshape(shape) for key, (name, shape) in upstream_names(module).items()}


@functools.cache
def upstream_linears(config: TransformerConfig) -> dict[str, tuple[str, tuple[int, int]]]:
    """For each linear of a transformer, by upstream's name: our name and the shape of its weight."""
    with on_meta("config"):
        module = Transformer(config)
    names = {ours: theirs for theirs, ours in TRANSFORMER_NAMES.items()}
    return {
        rename(name, names): (name, (linear.out_features, linear.in_features))
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    }


def upstream_names(module: Transformer | VAE) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each key of the module's state dict, its upstream name and the shape it has there."""
    table = TRANSFORMER_NAMES if isinstance(module, Transformer) else VAE_NAMES
    names = {ours: theirs for theirs, ours in table.items()}
    expected = {key: (rename(key, names), tuple(tensor.shape)) for key, tensor in module.state_dict().items()}
    if isinstance(module, Transformer) and module.config.patch_size_t is None:
        # Upstream's 1.0 has a convolution here, whose flattened kernel is the matrix of the same patches.
        config, (name, shape) = module.config, expected["patch_proj.weight"]
        expected["patch_proj.weight"] = name, (shape[0], config.in_channels, config.patch_size, config.patch_size)
    return expected


def rename(key: str, names: Mapping[str, str]) -> str:
    """Rename the key of a parameter; `names` has modules, with `{}` for the numbers of layers."""
    module, dot, kind = key.rpartition(".")
    if kind not in ("weight", "bias"):
        module, dot, kind = key, "", ""
    parts = module.split(".")
    row = ".".join("{}" if part.isdigit() else part for part in parts)
    return names[row].format(*(part for part in parts if part.isdigit())) + dot + kind


def map_state(state: Mapping[str, Tensor], module: Transformer | VAE, source: str | Path) -> dict[str, Tensor]:
    """Rename `state` for `module`; nothing is copied."""
    expected = upstream_names(module)
    check_names(state, dict(expected.values()), source)
    mapped = {key: state[name] for key, (name, _) in expected.items()}
    if isinstance(module, Transformer):
        mapped["patch_proj.weight"] = mapped["patch_proj.weight"].flatten(1)
    return mapped


def check_names(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str | Path) -> None:
    """Raise one line that lists what is missing, unexpected or of the wrong shape, with the nearest names."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [(n, tuple(state[n].shape), s) for n, s in expected.items() if n in state and tuple(state[n].shape) != s]
    faults = [
        listing("missing", missing, lambda n: f"{n}{nearest(n, unexpected)}"),
        listing("unexpected", unexpected, lambda n: f"{n}{nearest(n, missing or list(expected))}"),
        listing("of another shape", shapes, lambda s: f"{s[0]} is {list(s[1])}, want {list(s[2])}"),
    ]
    if any(faults):
        raise ValueError(f"{source}: got weights with {'; '.join(f for f in faults if f)}, want those of the config")


def nearest(name: str, names: Iterable[str]) -> str:
    """Say which of some names is the nearest to one, for a message."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" [nearest: {close[0]}]" if close else ""

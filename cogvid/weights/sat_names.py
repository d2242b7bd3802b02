"""The names and layout of weights in the authors' own code (SAT), mapped to upstream's and back.

Source: `tools/convert_weight_sat2hf.py` of zai-org/CogVideo. "Upstream" is diffusers, whose layout cogvid reads. Q, K
and V are one matrix in SAT. So are the modulations before attention and before the MLP, as twelve blocks of rows: for
video and then for text, each of the six of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogvid.config import TransformerConfig, VAEConfig
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.weights.names import check_names, on_meta, rename, upstream_names

TRANSFORMER_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
POSITIONS = "mixins.pos_embed.pos_embedding"

# Our module -> SAT's. Where several of ours have one of SAT's, the order is that of its rows: see `_PARTS`.
TRANSFORMER_NAMES = {
    "pos_embedding": POSITIONS,
    "patch_proj": "mixins.patch_embed.proj",
    "text_proj": "mixins.patch_embed.text_proj",
    "time_embed.linear_in": "time_embed.0",
    "time_embed.linear_out": "time_embed.2",
    "ofs_embed.linear_in": "ofs_embed.0",
    "ofs_embed.linear_out": "ofs_embed.2",
    "blocks.{}.modulation1": "mixins.adaln_layer.adaLN_modulations.{}.1",
    "blocks.{}.modulation2": "mixins.adaln_layer.adaLN_modulations.{}.1",
    "blocks.{}.norm1": "transformer.layers.{}.input_layernorm",
    "blocks.{}.q_proj": "transformer.layers.{}.attention.query_key_value",
    "blocks.{}.k_proj": "transformer.layers.{}.attention.query_key_value",
    "blocks.{}.v_proj": "transformer.layers.{}.attention.query_key_value",
    "blocks.{}.q_norm": "mixins.adaln_layer.query_layernorm_list.{}",
    "blocks.{}.k_norm": "mixins.adaln_layer.key_layernorm_list.{}",
    "blocks.{}.out": "transformer.layers.{}.attention.dense",
    "blocks.{}.norm2": "transformer.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp_in": "transformer.layers.{}.mlp.dense_h_to_4h",
    "blocks.{}.mlp_out": "transformer.layers.{}.mlp.dense_4h_to_h",
    "norm_final": "transformer.final_layernorm",
    "modulation_out": "mixins.final_layer.adaLN_modulation.1",
    "norm_out": "mixins.final_layer.norm_final",
    "proj_out": "mixins.final_layer.linear",
}
# In a transformer's file without being weights of it: tables that are computed, and embeddings that are not used.
_UNUSED = re.compile(r"mixins\.pos_embed\.freqs_(sin|cos)|transformer\.(position|word)_embeddings\.weight")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of SAT. parts: upstream's names and shapes of what it holds, in the order of its rows."""

    name: str
    parts: list[tuple[str, tuple[int, ...]]]

    @property
    def shape(self) -> tuple[int, ...]:
        _, (rows, *rest) = self.parts[0]
        return (len(self.parts) * rows, *rest)


def transformer_from_sat(
    state: Mapping[str, Tensor], config: TransformerConfig, source: str | Path
) -> dict[str, Callable[[], Tensor]]:
    """Map SAT's transformer to upstream's names; each value makes its tensor when called.

    state: what a file has under "module"; its names begin with `TRANSFORMER_PREFIX`, or all of them lack it.

    Raises:
        ValueError: names or shapes are not those of the config. source: names them in errors.
    """
    with on_meta(source):
        module = Transformer(config)
    found = _under(TRANSFORMER_PREFIX, state)
    found = {name: tensor for name, tensor in found.items() if not _UNUSED.fullmatch(name)}
    if POSITIONS in found and not config.use_learned_positional_embeddings:
        _check_sincos(found.pop(POSITIONS), module, source)
    tensors = _transformer(module)
    patches = "mixins.patch_embed.proj.weight"  # a convolution in 1.0's files, a matrix in those of later code
    if patches in found and found[patches].ndim == 2:
        shape = next(tensor.shape for tensor in tensors if tensor.name == patches)
        if found[patches].numel() == torch.Size(shape).numel():
            found[patches] = found[patches].reshape(shape)
    return _split_all(found, tensors, source)


def transformer_to_sat(state: Mapping[str, Tensor], config: TransformerConfig, source: str | Path) -> dict[str, Tensor]:
    """Map upstream's transformer to SAT's names, with their prefix; the inverse of `transformer_from_sat`."""
    with on_meta(source):
        module = Transformer(config)
    return {TRANSFORMER_PREFIX + name: x for name, x in _join_all(state, _transformer(module), source).items()}


def vae_from_sat(state: Mapping[str, Tensor], config: VAEConfig, source: str | Path) -> dict[str, Callable[[], Tensor]]:
    """Map SAT's VAE to upstream's names; as `transformer_from_sat`. What its loss was made of is left out."""
    with on_meta(source):
        module = VAE(config)
    found = {name: x for name, x in _under(VAE_PREFIX, state).items() if not name.startswith("loss.")}
    return _split_all(found, _vae(module), source)


def vae_to_sat(state: Mapping[str, Tensor], config: VAEConfig, source: str | Path) -> dict[str, Tensor]:
    """Map upstream's VAE to SAT's names; the inverse of `vae_from_sat`."""
    with on_meta(source):
        module = VAE(config)
    return _join_all(state, _vae(module), source)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what has the prefix, without it, or everything if nothing has it."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)} or dict(state)


def _transformer(module: Transformer) -> list[_Tensor]:
    tensors: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for key, upstream in upstream_names(module).items():
        tensors.setdefault(rename(key, TRANSFORMER_NAMES), []).append(upstream)
    return [_Tensor(name, parts) for name, parts in tensors.items()]


def _vae(module: VAE) -> list[_Tensor]:
    last = len(module.config.block_out_channels) - 1
    return [_Tensor(_vae_name(part[0], last), [part]) for part in upstream_names(module).values()]


def _vae_name(name: str, last: int) -> str:
    """Return SAT's name of a tensor of upstream's VAE. last: the number of its last block; in SAT it comes first."""
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"resnets\.(\d+)", r"block.\1", name)
    return re.sub(r"(down|up)samplers\.0", r"\1sample", name).replace("conv_shortcut", "nin_shortcut")


def _split_all(
    state: Mapping[str, Tensor], tensors: list[_Tensor], source: str | Path
) -> dict[str, Callable[[], Tensor]]:
    check_names(state, {tensor.name: tensor.shape for tensor in tensors}, source)

    def part(name: str, index: int, count: int) -> Callable[[], Tensor]:
        return lambda: _split(state[name], count)[index]

    return {
        name: part(tensor.name, index, len(tensor.parts))
        for tensor in tensors
        for index, (name, _) in enumerate(tensor.parts)
    }


def _join_all(state: Mapping[str, Tensor], tensors: list[_Tensor], source: str | Path) -> dict[str, Tensor]:
    check_names(state, dict(part for tensor in tensors for part in tensor.parts), source)
    return {tensor.name: _join([state[name] for name, _ in tensor.parts]) for tensor in tensors}


def _split(x: Tensor, count: int) -> tuple[Tensor, ...]:
    if count == 2:  # modulations: rows are (video, text) x (attention, MLP) x the rest
        return x.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(1, 2).unbind()
    return x.chunk(count)


def _join(parts: list[Tensor]) -> Tensor:
    if len(parts) == 2:
        return torch.stack(parts).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check_sincos(table: Tensor, module: Transformer, source: str | Path) -> None:
    """Raise unless a stored position table is the one that is computed here. 16 bits hold its numbers to 4e-3."""
    expected = module.initial_pos_embedding()
    if table.shape != expected.shape or not torch.allclose(table.float(), expected, rtol=0, atol=5e-3):
        raise ValueError(f"{source}: {POSITIONS}: got another table, want the sin-cos table of the config")

"""Load the parts of a checkpoint, and save them as diffusers reads them.

Only what is needed is read into memory. Modules are built on the meta device and safetensors are mapped. Where
neither device nor dtype changes, the parameters are the mapping itself: the kernel reads a page when it is first used
and may drop it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cogvid.config import ScheduleConfig, TransformerConfig, VAEConfig
from cogvid.models.cut_positions import CutPositions
from cogvid.models.quantize import linears_to_quantize, quantized
from cogvid.models.text import TextEncoder, Tokenizer, use_ops
from cogvid.models.tiling import TiledVAE
from cogvid.models.transformer import Block, Transformer
from cogvid.models.vae import VAE
from cogvid.ops import Ops
from cogvid.weights.checkpoint import CLASSES, FIXED, read_config
from cogvid.weights.files import load_state, stored_dtype, write_whole
from cogvid.weights.hub import BASENAME, TOKENIZER_FILES, WEIGHTS, component_directory
from cogvid.weights.names import map_state, on_meta, unmap_state_dict
from cogvid.weights.pages import drop_pages
from cogvid.weights.placement import Placement, resolve_placement, run_dtype
from cogvid.weights.text_config import read_text_config, read_tokenizer_config

SAT_LAST_NORM_EPS = 1e-6  # of `FinalLayerMixin` in SAT; diffusers takes the config's norm_eps
_EMBEDDING, _TIED = "shared.weight", "encoder.embed_tokens.weight"

Module = TypeVar("Module", Transformer, VAE)


def load_transformer(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    ops: str | Ops = "auto",
    variant: str | None = None,
    qk_norm: str = "layer",
    last_norm_eps: str = "diffusers",
    position_tables: str = "diffusers",
) -> Transformer:
    """Load the transformer of a checkpoint, or the one in its own directory.

    Args:
        source: as for `hub.find`, or a directory that holds the transformer's own config.json.
        dtype: float32, float16 or bfloat16, as a name or a `torch.dtype`; None is the stored one. A dtype that this CPU
            is slow at is replaced, with a warning: see `resolve_dtype`.
        ops: "auto", "torch", "triton" or an `Ops`.
        variant: which of several sets of weights to load, by the infix of its files' names, such as "fp16".
        qk_norm: "layer", or "rms": see `make_transformer`.
        last_norm_eps, position_tables: "diffusers" or "sat": see `LoadOptions`.

    Raises:
        ValueError: the files are missing, broken or not this model's; an argument is not one of the above.
    """
    directory = component_directory(source, "transformer", variant)
    config = read_config(directory, "transformer", TransformerConfig)
    state = load_state(directory, variant=variant)
    own = {"qk_norm": qk_norm, "last_norm_eps": last_norm_eps, "position_tables": position_tables}
    return make_transformer(config, state, _place(state, directory, device, dtype, ops, **own), directory)


def load_vae(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    ops: str | Ops = "auto",
    variant: str | None = None,
) -> VAE:
    """Load the VAE of a checkpoint, or the one in its own directory; arguments as for `load_transformer`."""
    directory = component_directory(source, "vae", variant)
    config = read_config(directory, "vae", VAEConfig)
    state = load_state(directory, variant=variant)
    return make_vae(config, state, _place(state, directory, device, dtype, ops), directory)


def load_text_encoder(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    ops: str | Ops = "auto",
    variant: str | None = None,
) -> TextEncoder:
    """Load the T5 encoder and the tokenizer of a checkpoint, from its `text_encoder/` and `tokenizer/`.

    Arguments and errors as for `load_transformer`. With float16 the `wo` matrices are float32, as transformers keeps
    them, because they overflow.
    """
    directory = component_directory(source, "text_encoder", variant)
    tokenizer = component_directory(source, "tokenizer")
    state = load_state(directory, WEIGHTS["text_encoder"], variant)
    return make_text_encoder(directory, tokenizer, state, _place(state, directory, device, dtype, ops))


def make_transformer(
    config: TransformerConfig, state: Mapping[str, Tensor], placement: Placement, source: str | Path
) -> Transformer:
    """Build a transformer with the weights of an upstream state dict. source: names them in errors.

    `qk_norm` of the placement: "layer" is exact. "rms" centres the weights of the Q and K projections over each head,
    in fp32, before they are rounded to the dtype. The Q and K norms are then RMSNorm: the same function, one pass less
    over a row. bf16 and fp16 round the centred weights anew, so results differ in the last bits.
    """
    cut = placement.position_tables == "sat" and config.patch_size_t is None
    with on_meta(source), _WithoutInit():
        module = (CutPositions if cut else Transformer)(config, placement.ops)
    mapped = map_state(state, module, source)
    if placement.qk_norm == "rms":
        for key in mapped:
            if ".q_proj." in key or ".k_proj." in key:
                centred = centre_heads(mapped[key].float(), config.num_attention_heads)
                mapped[key] = centred.to(placement.dtype)
    module = _fill(module, mapped, placement)
    if placement.last_norm_eps == "sat":
        module.norm_out.eps = SAT_LAST_NORM_EPS
    for block in module.blocks:
        assert isinstance(block, Block)
        block.centred = placement.qk_norm == "rms"
    return module


def centre_heads(weight: Tensor, heads: int) -> Tensor:
    """Take its mean from each head's rows of a weight or bias of a Q or K projection: `[heads * hd, ...]`."""
    each = weight.unflatten(0, (heads, -1))
    return (each - each.mean(1, keepdim=True)).flatten(0, 1)


def make_vae(config: VAEConfig, state: Mapping[str, Tensor], placement: Placement, source: str | Path) -> VAE:
    """Build a VAE with the weights of an upstream state dict. source: names them in errors."""
    with on_meta(source), _WithoutInit():
        module = (TiledVAE if placement.vae_tiling else VAE)(config, placement.ops)
    return _fill(module, map_state(state, module, source), placement)


def make_text_encoder(directory: Path, tokenizer: Path, state: dict[str, Tensor], placement: Placement) -> TextEncoder:
    """Build a text encoder from its config, the folder of its tokenizer and its state dict."""
    from transformers import T5Config, T5EncoderModel

    tokens = read_tokenizer(tokenizer)
    config = read_text_config(directory)
    with on_meta(directory):
        encoder = T5EncoderModel(T5Config(**config.to_dict()))
    encoder.set_input_embeddings(encoder.shared)  # the stack makes a table of its own
    use_ops(encoder, placement.ops)

    # One matrix under two names. Which of them is stored, or both, depends on the version that wrote the file.
    if _TIED in state:
        state.setdefault(_EMBEDDING, state.pop(_TIED))
    placed = _placed(encoder, state, placement)
    if _EMBEDDING in placed:
        placed[_TIED] = placed[_EMBEDDING]
    try:
        encoder.load_state_dict(placed, strict=True, assign=True)
    except RuntimeError as error:  # names or shapes
        reason = " ".join(str(error).split())
        raise ValueError(f"{directory}: got {reason:.400}, want the weights of the config") from None
    _quantize(encoder, placement)
    return TextEncoder(encoder.eval().requires_grad_(False), tokens, placement.device)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint from its folder."""
    pieces, options = (folder / name for name in TOKENIZER_FILES)
    return Tokenizer(pieces, read_tokenizer_config(options).extra_ids)


def _place(
    state: Mapping[str, Tensor],
    source: Path,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    ops: str | Ops,
    **options: str,
) -> Placement:
    """Resolve the placement of a part that is loaded alone, whose own dtype is the default."""
    place = resolve_placement(device=device, dtype=dtype, ops=ops, **options)
    return place(str(stored_dtype(state, source)).removeprefix("torch."))


def _fill(module: Module, state: Mapping[str, Tensor], placement: Placement) -> Module:
    """Give a module on the meta device its weights."""
    module.load_state_dict(_placed(module, state, placement), strict=True, assign=True)
    _quantize(module, placement)
    return module.eval().requires_grad_(False)


def _placed(module: nn.Module, state: Mapping[str, Tensor], placement: Placement) -> dict[str, Tensor]:
    """Return the weights of a part as it takes them: where and as they run.

    Those that are quantised next are still as they are stored. So are matrices where weights leave the device, which
    come to it, in the run's dtype, at each use, and those that are sharded next.
    """
    later = {f"{name}.weight" for name in linears_to_quantize(module)} if placement.quantize else set()
    leave = placement.offload is not None or (placement.shard_weights and not isinstance(module, VAE))
    return {
        key: tensor
        if key in later or (leave and tensor.ndim > 1)
        else tensor.to(placement.device, run_dtype(key, placement.dtype))
        for key, tensor in state.items()
    }


def _quantize(module: nn.Module, placement: Placement) -> None:
    """Quantise the linears of a part, one after the other, so that no two are there in full."""
    if placement.quantize is None:
        return
    for name in linears_to_quantize(module):
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        stored = linear.weight
        # Where weights leave the device, or are sharded next, they rest in memory.
        where = "cpu" if placement.offload or placement.shard_weights else placement.device
        linear.to(where, run_dtype(name, placement.dtype))
        module.set_submodule(name, quantized(linear, placement.quantize, name))
        drop_pages([stored])


class _WithoutInit(TorchFunctionMode):
    """Skip the initialisation of linears and convolutions, which takes a quarter of the time of a load on meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in _INIT else func(*args, **kwargs)


_INIT = (nn.init.kaiming_uniform_, nn.init.uniform_)


def save_transformer(module: Transformer, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and the safetensors that `CogVideoXTransformer3DModel.from_pretrained` reads.

    dtype: of the file; None keeps the module's.
    """
    _save(module, "transformer", Path(directory), dtype)


def save_vae(module: VAE, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and the safetensors that `AutoencoderKLCogVideoX.from_pretrained` reads."""
    _save(module, "vae", Path(directory), dtype)


def config_json(component: str, config: TransformerConfig | VAEConfig | ScheduleConfig) -> str:
    """Return the text of a component's config as upstream writes it."""
    values = config.to_dict()
    if isinstance(config, TransformerConfig):
        del values["qk_norm_eps"]  # a constant in upstream's code
    if isinstance(config, VAEConfig):
        blocks = len(config.block_out_channels)
        values["down_block_types"] = ["CogVideoXDownBlock3D"] * blocks
        values["up_block_types"] = ["CogVideoXUpBlock3D"] * blocks
    return json.dumps({"_class_name": CLASSES[component][0], **FIXED.get(component, {}), **values}, indent=2) + "\n"


def _save(module: Transformer | VAE, component: str, directory: Path, dtype: torch.dtype | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: x.to("cpu", dtype).contiguous() for name, x in unmap_state_dict(module).items()}
    write_whole(directory / f"{BASENAME}.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    text = config_json(component, module.config)
    write_whole(directory / "config.json", lambda path: path.write_text(text))

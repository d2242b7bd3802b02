"""Linears with weights of 8 bits, for the transformer and T5: by torchao, or stored as float8 and cast at use.

What is quantised are the linears of the blocks that see every token: Q, K, V, output and MLP, 9 in 10 of the weights of
5B outside the modulation. The others stay: embeddings of patches, text and time, modulation, norms and the last
projection, to which results are most sensitive. diffusers' layerwise casting leaves out the same by its default
patterns, but for the two small linears of the time (and ofs) embedding.

A quantised linear is called like any module; `can_fuse` allows no operation to take its weights.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvid.models.transformer import Transformer

STORAGE = torch.float8_e4m3fn
QUANTIZED = (".q_proj", ".k_proj", ".v_proj", ".out", ".mlp_in", ".mlp_out")  # of the transformer's blocks
CONFIGS = {  # name -> class of torchao.quantization
    "int8": "Int8WeightOnlyConfig",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "fp8": "Float8WeightOnlyConfig",
}
METHODS = (*CONFIGS, "fp8-storage")


class CastLinear(nn.Module):
    """A linear whose weight and bias are stored in float8 (e4m3) and cast to the compute dtype at each call.

    Must equal diffusers' `enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)`, which casts the bias too.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.dtype = linear.weight.dtype
        self.stored = nn.Parameter(linear.weight.to(STORAGE), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(STORAGE), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight as it is used, `[out, in]`; T5 asks for its dtype."""
        return self.stored.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(self.dtype))


def check_torchao(method: str) -> None:
    """Raise `ImportError` unless what the method needs is installed."""
    if method in CONFIGS:
        try:
            importlib.import_module("torchao.quantization")
        except ImportError as error:
            raise ImportError(
                f"quantize: got {method!r} and no usable torchao ({error!s:.100}), want the extra 'quant' "
                "(pip install 'cogvid[quant]'), or 'fp8-storage', which needs nothing"
            ) from error


def linears_to_quantize(part: nn.Module) -> list[str]:
    """Return the names of the linears that are quantised: of T5 all of them, of the VAE, which has none, none."""
    names = [name for name, module in part.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(part, Transformer):
        return [name for name in names if name.startswith("blocks.") and name.endswith(QUANTIZED)]
    return names


def quantized(linear: nn.Linear, method: str, name: str) -> nn.Module:
    """Return a linear with 8-bit weights in place of one that is where it runs and in the dtype that it computes in.

    name: of the linear, for errors.

    Raises:
        ValueError: a weight that float8 cannot hold.
    """
    if method == "fp8-storage":
        largest = torch.finfo(STORAGE).max
        for parameter in linear.parameters():
            if (found := parameter.abs().amax().item()) > largest:
                raise ValueError(f"quantize: got {name} with a weight of {found:g}, want at most {largest:g} in float8")
        return CastLinear(linear)
    quantization = importlib.import_module("torchao.quantization")
    whole = nn.Sequential(linear)
    quantization.quantize_(whole, getattr(quantization, CONFIGS[method])())
    return whole[0]


def quantized_linears(part: nn.Module) -> dict[str, tuple[int, int]]:
    """Return for each quantised linear the bytes of its weight, and what they would be in the dtype that it is used in.

    A linear counts only if its weight is held in 8 bits, whatever was asked for.
    """
    found = {}
    for name, module in part.named_modules():
        if isinstance(module, CastLinear):
            found[name] = module.stored.nbytes, module.stored.numel() * module.dtype.itemsize
        elif isinstance(module, nn.Linear) and hasattr(module.weight, "__tensor_flatten__"):
            weight: Any = module.weight
            names, _ = weight.__tensor_flatten__()
            inner = [getattr(weight, each) for each in names]
            if any(each.itemsize == 1 and each.numel() == weight.numel() for each in inner):
                found[name] = sum(each.nbytes for each in inner), weight.numel() * weight.dtype.itemsize
    return found

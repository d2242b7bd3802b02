"""Linears with weights of 8 bits, for the transformer and T5: by torchao, or stored as float8 and cast at use.

What is quantised are the linears of the blocks that see every token: Q, K, V, output and MLP, 9 in 10 of the weights of
5B outside the modulation. The others stay: embeddings of patches, text and time, modulation, norms and the last
projection, to which results are most sensitive. diffusers' layerwise casting leaves out the same by its default
patterns, but for the two small linears of the time (and ofs) embedding.

A quantised linear is called like any module; `can_fuse` allows no operation to take its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvid.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import T5EncoderModel

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
            import torchao.quantization  # noqa: F401 # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"quantize: got {method!r} and no usable torchao ({error!s:.100}), want the extra 'quant' "
                "(pip install 'cogvid[quant]'), or 'fp8-storage', which needs nothing"
            ) from error


def linears_to_quantize(part: Transformer | T5EncoderModel) -> list[str]:
    """Return the names of the linears that are quantised; of T5 all of them."""
    names = [name for name, module in part.named_modules() if isinstance(module, (nn.Linear, CastLinear))]
    if isinstance(part, Transformer):
        return [name for name in names if name.startswith("blocks.") and name.endswith(QUANTIZED)]
    return names


def quantize(part: Transformer | T5EncoderModel, method: str, device: torch.device, dtype: torch.dtype) -> None:
    """Quantise the linears of a part, in place, one after the other, so that no two are in memory in full.

    device: where the quantised weights go. dtype: of the computation; a weight may be stored in another.

    Raises:
        ValueError: a weight that float8 cannot hold.
    """
    for name in linears_to_quantize(part):
        linear = part.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        # T5's `wo` is fp32 where the rest is fp16; the placed bias or the dtype says which.
        linear.to(device, torch.float32 if dtype == torch.float16 and name.endswith(".wo") else dtype)
        owner, _, child = name.rpartition(".")
        setattr(part.get_submodule(owner), child, _quantized(linear, method, name))


def _quantized(linear: nn.Linear, method: str, name: str) -> nn.Module:
    if method == "fp8-storage":
        largest = torch.finfo(STORAGE).max
        for parameter in linear.parameters():
            if (found := parameter.abs().amax().item()) > largest:
                raise ValueError(f"quantize: got {name} with a weight of {found:g}, want at most {largest:g} in float8")
        return CastLinear(linear)
    quantization: Any = __import__("torchao.quantization", fromlist=["quantization"])
    quantization.quantize_(linear, getattr(quantization, CONFIGS[method])())
    return linear

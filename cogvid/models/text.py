"""Token ids to embeddings: T5's encoder, run as diffusers' `CogVideoXPipeline.encode_prompt` runs it.

The prompt is not cleaned, it is padded to a fixed length, and there is no attention mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cogvid.media.tokenizer import Tokenizer
from cogvid.ops import Ops

if TYPE_CHECKING:
    from transformers import T5EncoderModel


class TextEncoder:
    """Encode prompts with T5: transformers' `T5EncoderModel` and a `Tokenizer`. device: where T5 runs."""

    def __init__(self, t5: T5EncoderModel, tokenizer: Tokenizer, device: torch.device) -> None:
        self.t5 = t5
        self.tokenizer = tokenizer
        self.device = device

    def set_ops(self, ops: Ops) -> None:
        """Run these operations from now on."""
        use_ops(self.t5, ops)

    @property
    def dtype(self) -> torch.dtype:
        return self.t5.shared.weight.dtype

    def __call__(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """Return embeddings `[B, max_length, E]` in the encoder's dtype, on its device.

        Padding is encoded like text, because the models were trained so. Must equal diffusers'
        `_get_t5_prompt_embeds`.

        Raises:
            ValueError: the encoder has no embedding for a token of a prompt.
        """
        ids = self.tokenizer.encode(prompts, max_length)
        rows, size = ids.tolist(), self.t5.config.vocab_size
        for prompt, row in zip(prompts, rows, strict=True):
            if max(row) >= size:
                piece = self.tokenizer.piece(max(row))
                raise ValueError(
                    f"prompt: got {prompt!r:.40} with the piece {piece!r} of id {max(row)}, want ids below {size}, "
                    "the text encoder's vocab_size"
                )
        return self.t5(ids.to(self.device)).last_hidden_state


class _RMSNorm(nn.Module):
    """T5's layer norm, computed by an op of the bundle. Must equal transformers' `T5LayerNorm`."""

    def __init__(self, weight: nn.Parameter, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        # With float16 weights, x is float32, because `wo` is float32. The next projection needs the weights' dtype.
        return self.ops.rms_norm(x, self.weight, eps=self.eps).to(self.weight.dtype)


def use_ops(model: T5EncoderModel, ops: Ops) -> None:
    """Make the norms of a T5 encoder run an op bundle, in place. Their weights and names stay the same."""
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _RMSNorm):
                child.ops = ops
            elif isinstance(child, T5LayerNorm):
                setattr(module, name, _RMSNorm(child.weight, child.variance_epsilon, ops))

"""Text encoding on several processes: once, in rank 0, for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cogvid.models.text import TextEncoder, Tokenizer
from cogvid.ops import Ops
from cogvid.parallel.share import share


class SharedEncoder(TextEncoder):
    """A text encoder whose weights only rank 0 has: it encodes for all. encoder: None in the other processes."""

    def __init__(self, encoder: TextEncoder | None, tokenizer: Tokenizer, device: torch.device) -> None:
        super().__init__(encoder.t5 if encoder else _NoT5(), tokenizer, device)  # pyright: ignore[reportArgumentType]
        self._encoder = encoder

    def set_ops(self, ops: Ops) -> None:
        if self._encoder is not None:
            self._encoder.set_ops(ops)

    def __call__(self, prompts: Sequence[str], max_length: int) -> Tensor:
        def encoded() -> Tensor:
            assert self._encoder is not None
            return self._encoder(prompts, max_length)

        return share(encoded, self.device)


class _NoT5(nn.Module):
    """What a process without T5 has in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList()

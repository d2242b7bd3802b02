"""Text encoding on several processes: once, in rank 0, for all; or, where each has a part of the weights, by all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cogvid.models.text import TextEncoder, Tokenizer
from cogvid.ops import Ops
from cogvid.parallel.share import all_or_none, share


class SharedEncoder(TextEncoder):
    """A text encoder that gives every process the embeddings of rank 0.

    encoder: None in a process without its weights. sharded: all have it and must run it, as each has a part of them.
    """

    def __init__(
        self, encoder: TextEncoder | None, tokenizer: Tokenizer, device: torch.device, *, sharded: bool = False
    ) -> None:
        super().__init__(encoder.t5 if encoder else _NoT5(), tokenizer, device)  # pyright: ignore[reportArgumentType]
        self._encoder, self._sharded = encoder, sharded

    def set_ops(self, ops: Ops) -> None:
        if self._encoder is not None:
            self._encoder.set_ops(ops)

    def __call__(self, prompts: Sequence[str], max_length: int) -> Tensor:
        def encoded() -> Tensor:
            assert self._encoder is not None
            return self._encoder(prompts, max_length)

        if not self._sharded:
            return share(encoded, self.device)
        with all_or_none():
            mine = encoded()
        return share(lambda: mine, self.device)


class _NoT5(nn.Module):
    """What a process without T5 has in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList()

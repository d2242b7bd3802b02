"""Prompt to embeddings: T5's tokenizer on sentencepiece, and its encoder.

The encoder is transformers' `T5EncoderModel`, run as diffusers' `CogVideoXPipeline.encode_prompt` runs it: the prompt
as it is (no cleaning), padded to a fixed length, no attention mask.

Token ids are those of transformers' `T5Tokenizer`, but for one case: where normalisation rewrites a character that is
followed by combining marks or joiners, transformers 5 may replace all of them by what the first becomes, and so lose
marks. The ids here are sentencepiece's, with which T5 was trained.
"""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cogvid.ops import Ops

if TYPE_CHECKING:
    from transformers import T5EncoderModel

# What transformers splits words at. Python's own \s has four control characters more.
_SPACES = "\t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_WORD_START = "\u2581"  # sentencepiece's visible space
_WORD_LIST = 1000  # pieces; a smaller vocabulary lists the words of a small world, and letters for whatever else


class TextEncoder:
    """Encode prompts with T5."""

    def __init__(self, model: T5EncoderModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @property
    def dtype(self) -> torch.dtype:
        return self.model.shared.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.shared.weight.device

    def __call__(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """Return embeddings `[B, max_length, E]` in the encoder's dtype, on its device.

        Padding is encoded like text, because the models were trained so. Must equal `_get_t5_prompt_embeds`.

        Raises:
            ValueError: a prompt has a token that the encoder has no embedding for.
        """
        ids = self.tokenizer.encode(prompts, max_length)
        rows, size = ids.tolist(), self.model.config.vocab_size
        for prompt, row in zip(prompts, rows, strict=True):
            if max(row) >= size:
                piece = self.tokenizer.piece(max(row))
                raise ValueError(
                    f"prompt {prompt!r:.40}: got the piece {piece!r} of id {max(row)}, want ids below {size}, "
                    "the text encoder's vocab_size"
                )
        return self.model(ids.to(self.device)).last_hidden_state


class Tokenizer:
    """Turn text into T5's token ids.

    spiece_path: the `spiece.model` of a checkpoint. extra_ids: number of `<extra_id_N>` sentinels; their ids follow
    those of the model, counted down.
    """

    def __init__(self, spiece_path: str | Path, extra_ids: int = 100) -> None:
        from sentencepiece import SentencePieceProcessor

        if not Path(spiece_path).is_file():
            raise ValueError(f"{spiece_path}: no such file, wanted a sentencepiece model")
        try:
            self.model = SentencePieceProcessor(model_file=str(spiece_path))
        except RuntimeError as error:
            raise ValueError(f"{spiece_path}: not a sentencepiece model ({error})") from None
        size = self.model.get_piece_size()
        self.pad, self.eos = self.model.pad_id(), self.model.eos_id()
        if self.pad < 0 or self.eos < 0:
            raise ValueError(f"{spiece_path}: got no {'pad' if self.pad < 0 else 'eos'} token, wanted a T5 model")
        self._special = {
            self.model.id_to_piece(i): i for i in range(size) if self.model.is_control(i) or self.model.is_unknown(i)
        } | {f"<extra_id_{i}>": size + extra_ids - 1 - i for i in range(extra_ids)}
        self._split_special = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")
        pieces = [self.model.id_to_piece(i) for i in range(size)] if size < _WORD_LIST else []
        self._words = {piece.removeprefix(_WORD_START) for piece in pieces if piece.startswith(_WORD_START)}
        self._spaces = {ord(c): " " for c in _SPACES if self._keeps(c)}
        self._keeps_word_start = self._keeps(_WORD_START)
        self.vocab_size = size + extra_ids

    def encode(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """Return int64 ids `[B, max_length]`: text, end of sequence, padding; warn of words cut off or unknown."""
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompts: got {type(prompts).__name__} {prompts!r:.60}, wanted a list of str")
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, wanted at least 1")
        ids = torch.full((len(prompts), max_length), self.pad)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self._tokenize(prompt)
            if (excess := len(tokens) + 1 - max_length) > 0:
                warnings.warn(
                    f"prompt {prompt!r:.40}: {len(tokens)} tokens and the end are more than {max_length}; "
                    f"the last {excess} are not used",
                    stacklevel=3,
                )
            if unknown := self.unknown_words(prompt):
                listed = ", ".join(f"{word!r:.30}" for word in unknown[:5])
                listed += f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
                warnings.warn(
                    f"prompt {prompt!r:.40}: {listed} {'is' if len(unknown) == 1 else 'are'} not in the vocabulary of "
                    "the text encoder, which cannot tell what is meant",
                    stacklevel=3,
                )
            kept = [*tokens[: max_length - 1], self.eos]
            row[: len(kept)] = torch.tensor(kept)
        return ids

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt, each once, whose meaning does not reach the encoder.

        These are words with the unknown piece in them, and where the vocabulary is a list of words, the others that it
        lacks: they are spelt in letters and ends of words, which the training text did not have.
        """
        parts = [part for part in self._split_special.split(prompt) if part not in self._special]
        words = [word.strip(string.punctuation) or word for word in " ".join(parts).split()]
        return [word for word in dict.fromkeys(words) if not self._knows(word)]

    def _knows(self, word: str) -> bool:
        if self.model.unk_id() in self._tokenize_word(word):
            return False
        if not self._words or word[0] in string.punctuation:
            return True
        return word in self._words or (word.istitle() and word.lower() in self._words)

    def piece(self, token: int) -> str:
        """Return the text of a token, sentinels included."""
        return next((text for text, i in self._special.items() if i == token), None) or self.model.id_to_piece(token)

    def _tokenize(self, prompt: str) -> list[int]:
        ids: list[int] = []
        for part in self._split_special.split(prompt):
            if part in self._special:
                ids.append(self._special[part])
            else:
                for word in part.translate(self._spaces).split(" "):
                    ids += self._tokenize_word(word)
        return ids

    def _tokenize_word(self, word: str) -> list[int]:
        if _WORD_START not in word or not self._keeps_word_start:
            return self.model.encode(word)
        # transformers starts a word at each of these characters, where sentencepiece would join or strip them
        starts = re.findall(f"{_WORD_START}[^{_WORD_START}]*|^[^{_WORD_START}]+", word)
        alone = self.model.piece_to_id(_WORD_START)
        return [i for s in starts for i in self.model.encode(s.removeprefix(_WORD_START)) or [alone]]

    def _keeps(self, character: str) -> bool:
        """Say whether the model's normalisation leaves a character as it is; twice, because a space would collapse."""
        return self.model.normalize(f"a{character}{character}b").endswith(f"a{character}{character}b")


class _RMSNorm(nn.Module):
    """T5's layer norm on the op bundle. Must equal transformers' `T5LayerNorm`."""

    def __init__(self, weight: nn.Parameter, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        # With float16 weights x is float32, because `wo` is; the next projection wants the dtype of the weights.
        return self.ops.rms_norm(x, self.weight, eps=self.eps).to(self.weight.dtype)


def use_ops(model: T5EncoderModel, ops: Ops) -> None:
    """Run the norms of a T5 encoder on an op bundle, in place; their weights and names stay."""
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, T5LayerNorm):
                setattr(module, name, _RMSNorm(child.weight, child.variance_epsilon, ops))

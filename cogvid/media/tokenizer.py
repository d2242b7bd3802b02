"""Prompts to T5's token ids, on sentencepiece.

They equal those of transformers' `T5Tokenizer`, with one exception. When normalisation rewrites a character with
combining marks or joiners after it, transformers 5 may replace all of them by the rewritten character, and so lose
marks. The ids here are those of sentencepiece, with which T5 was trained.
"""

from __future__ import annotations

import os
import re
import string
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# The characters at which transformers splits words. Python's own \s has four control characters more.
_SPACES = "\t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_WORD_START = "\u2581"  # sentencepiece writes a space as this character
_MAX_BYTES = 2**24  # of a sentencepiece model; T5's has 0.8 MB
_WORD_LIST = 1000  # pieces; a smaller vocabulary is a list of whole words, plus letters for all others


def check_text(name: str, text: str) -> None:
    """Raise unless a string is text: a half of a surrogate pair, as bytes that are no UTF-8 become, is not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: got {text[error.start]!r} at {error.start}, want text in UTF-8") from None


class Tokenizer:
    """Turn text into T5's token ids.

    spiece_path: the `spiece.model` of a checkpoint. extra_ids: number of `<extra_id_N>` sentinels; their ids come after
    those of the model, in falling order of N.
    """

    def __init__(self, spiece_path: str | Path, extra_ids: int = 100) -> None:
        from sentencepiece import SentencePieceProcessor

        if not os.path.isfile(spiece_path):
            raise ValueError(f"{spiece_path}: got no file, want a sentencepiece model")
        if (length := os.path.getsize(spiece_path)) > _MAX_BYTES:
            raise ValueError(f"{spiece_path}: got {length} bytes, want a sentencepiece model of at most {_MAX_BYTES}")
        try:
            self.processor = SentencePieceProcessor(model_file=str(spiece_path))
            size = self.processor.get_piece_size()
            for i in range(size):
                self.processor.id_to_piece(i)  # raises for a piece that is no UTF-8
        except (RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{spiece_path}: got a broken file ({reason:.200}), want a sentencepiece model") from None
        self.pad, self.eos = self.processor.pad_id(), self.processor.eos_id()
        if self.pad < 0 or self.eos < 0:
            raise ValueError(f"{spiece_path}: got no {'pad' if self.pad < 0 else 'eos'} token, want a T5 model")
        self._special = {
            self.processor.id_to_piece(i): i
            for i in range(size)
            if self.processor.is_control(i) or self.processor.is_unknown(i)
        } | {f"<extra_id_{i}>": size + extra_ids - 1 - i for i in range(extra_ids)}
        self._split_special = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")
        pieces = [self.processor.id_to_piece(i) for i in range(size)] if size < _WORD_LIST else []
        self._words = {piece.removeprefix(_WORD_START) for piece in pieces if piece.startswith(_WORD_START)}
        self._spaces = {ord(c): " " for c in _SPACES if self._keeps(c)}
        self._keeps_word_start = self._keeps(_WORD_START)
        self.vocab_size = size + extra_ids

    def encode(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """Return int64 ids `[B, max_length]`: text, end of sequence, padding. Warn of cut tokens and unknown words."""
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompts: got {type(prompts).__name__} {prompts!r:.60}, want a list of str")
        for prompt in prompts:
            check_text("prompts", prompt)
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, want at least 1")
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
        """Return the words of a prompt, each once, that the encoder cannot understand.

        These are words that contain the unknown piece. If the vocabulary is a list of words, they are also the words
        that are not in it: they are split into letters and word endings, which the training text did not contain.
        """
        parts = [part for part in self._split_special.split(prompt) if part not in self._special]
        words = [word.strip(string.punctuation) or word for word in " ".join(parts).split()]
        return [word for word in dict.fromkeys(words) if not self._knows(word)]

    def _knows(self, word: str) -> bool:
        if self.processor.unk_id() in self._tokenize_word(word):
            return False
        if not self._words or word[0] in string.punctuation:
            return True
        return word in self._words or (word.istitle() and word.lower() in self._words)

    def piece(self, token: int) -> str:
        """Return the text of a token id, also of a sentinel."""
        return next((text for text, i in self._special.items() if i == token), None) or self.processor.id_to_piece(
            token
        )

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
            return self.processor.encode(word)
        # transformers starts a word at each of these characters; sentencepiece would join or strip them.
        starts = re.findall(f"{_WORD_START}[^{_WORD_START}]*|^[^{_WORD_START}]+", word)
        bare = self.processor.piece_to_id(_WORD_START)
        return [i for s in starts for i in self.processor.encode(s.removeprefix(_WORD_START)) or [bare]]

    def _keeps(self, character: str) -> bool:
        """Say whether the model's normalisation keeps a character. Tested with two, because two spaces become one."""
        return self.processor.normalize(f"a{character}{character}b").endswith(f"a{character}{character}b")

"""Tiny text parts of a checkpoint, in the official layout: a trained sentencepiece model and a random T5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import T5EncoderModel, T5Tokenizer

from references import spiece_model, tiny_encoder

RULES = ("nmt_nfkc", "identity")  # T5's own normalisation, and that of the shipped packs


def train_tokenizer(directory: Path, rule: str) -> Path:
    """Write a `spiece.model` and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "spiece.model"
    path.write_bytes(spiece_model(rule))
    return path


def save_text_parts(
    root: Path,
    *,
    rule: str = "nmt_nfkc",
    extra_ids: int = 100,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    seed: int = 0,
) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Write `text_encoder/` and `tokenizer/` with transformers and return what was written, the encoder in fp32."""
    encoder = tiny_encoder(vocab_size=320, seed=seed)
    encoder.to(dtype).save_pretrained(root / "text_encoder", max_shard_size=shard)
    spiece = train_tokenizer(root / "spiece", rule)
    tokenizer = T5Tokenizer.from_pretrained(spiece.parent, extra_ids=extra_ids)
    tokenizer.save_pretrained(root / "tokenizer")
    shutil.move(spiece, root / "tokenizer" / "spiece.model")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    return encoder.float(), tokenizer

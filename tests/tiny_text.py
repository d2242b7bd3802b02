"""Tiny text parts of a checkpoint, in the official layout: a trained sentencepiece model and a random T5."""

from __future__ import annotations

import io
import json
import random
import shutil
from functools import cache
from pathlib import Path

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from tests.reference import perturb

TEXT_WIDTH = 40  # of the encoder, and of the text that the tiny transformers take
RULES = ("nmt_nfkc", "identity")  # T5's own normalisation, and that of the shipped packs
_WORDS = (
    "a red blue green circle circle. circles square triangle moves to the left right up down grows shrinks stays still"
    " on white background panda dressed in small jacket café naïve über straße garçon élève"
    " 12 3 4 . , ! ? ( ) - ' \" ; : ê"
)


@cache
def spiece_model(rule: str = "nmt_nfkc") -> bytes:
    """Train a T5-like sentencepiece model."""
    draw, words, model = random.Random(0), _WORDS.split(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter([" ".join(draw.choices(words, k=10)) for _ in range(2000)]),
        model_writer=model,
        vocab_size=150,
        model_type="unigram",
        normalization_rule_name=rule,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def train_tokenizer(directory: Path, rule: str) -> Path:
    """Write a `spiece.model` and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "spiece.model"
    path.write_bytes(spiece_model(rule))
    return path


def tiny_encoder(vocab_size: int, seed: int = 0) -> T5EncoderModel:
    """Build a T5 encoder with every parameter perturbed; its width is that of the tiny transformers' text."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=12,
        d_ff=56,
        num_layers=3,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )
    torch.manual_seed(seed)
    return perturb(T5EncoderModel(config), seed).eval().requires_grad_(False)


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

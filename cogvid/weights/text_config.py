"""What T5's encoder and its tokenizer need of their configs, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cogvid.json_config import Count, Depth, JsonConfig, Positive, short
from cogvid.weights.files import read_json

FEED_FORWARDS = tuple(gate + act for gate in ("", "gated-") for act in ("relu", "gelu", "gelu_new", "silu"))


@dataclass(frozen=True)
class TextConfig(JsonConfig):
    """Architecture of the text encoder; the defaults are those of transformers' `T5Config`.

    feed_forward_proj: one of `FEED_FORWARDS`; CogVideoX has "gated-gelu".
    """

    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: Depth = 6
    num_heads: int = 8
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: Positive = 1e-6
    feed_forward_proj: str = "relu"

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in FEED_FORWARDS:
            got, want = short(self.feed_forward_proj), ", ".join(FEED_FORWARDS)
            raise ValueError(f"feed_forward_proj: got {got}, want one of {want}")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        # Half of the buckets are for one direction, and half of these for one distance each; the rest grow up to the
        # greatest distance.
        if buckets < 4:
            raise ValueError(f"relative_attention_num_buckets: got {buckets}, want at least 4")
        if distance <= buckets // 4:
            raise ValueError(f"relative_attention_max_distance: got {distance}, want more than {buckets // 4}")

    @property
    def gated(self) -> bool:
        """True when the feed-forward layers have a gate, a third matrix."""
        return self.feed_forward_proj.startswith("gated-")


T5_XXL = TextConfig(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")  # v1.1


@dataclass(frozen=True)
class TokenizerConfig(JsonConfig):
    """extra_ids: number of `<extra_id_N>` sentinels."""

    extra_ids: Count = 100


def read_text_config(directory: Path) -> TextConfig:
    """Read the `config.json` of a text encoder; raise `ValueError` for another model or values out of range."""
    path = directory / "config.json"
    values = read_json(path)
    try:
        config = TextConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    gated, _, act = config.feed_forward_proj.rpartition("-")
    follows = {
        "dense_act_fn": "gelu_new" if config.feed_forward_proj == "gated-gelu" else act,
        "is_gated_act": bool(gated),
    }
    for name, value in follows.items():
        if (got := values.get(name, value)) != value:
            reason = f"as feed_forward_proj {config.feed_forward_proj} has"
            raise ValueError(f"{path}: {name}: got {short(got)}, want {value!r} {reason}")
    return config


def read_tokenizer_config(path: Path) -> TokenizerConfig:
    """Read a `tokenizer_config.json`, or take the defaults where there is none."""
    try:
        return TokenizerConfig.from_dict(read_json(path) if os.path.lexists(path) else {})
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None

"""Token ids against transformers' `T5Tokenizer`, embeddings against diffusers' `encode_prompt`."""

from __future__ import annotations

import random
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import T5EncoderModel, T5Tokenizer

from cogvid.models.text import Tokenizer
from cogvid.weights.load import load_text_encoder
from measure import pooled_ratio, rel_rms
from tests.tiny_text import RULES, save_text_parts, train_tokenizer
from tests.tolerances import LOW_PRECISION_TEXT, TEXT_FP32

# Every pair and every context below is compared. Marks and joiners are in their own test.
FRAGMENTS = (
    *("", " ", "  ", "a", "circle", " red ", "Circle.", "12", "3.5", "café", "straße", "ê", "İ", "Å", "\u212b", "ά"),
    *("\t", "\n", "\r\n", "\v", "\f", "\x00", "\x01", "\x1c", "\x1f", "\x7f", "\x85", "\xa0", "\xad", "\u200b"),
    *("\u2028", "\u3000", "\ufeff", "\ufffd", "\u2581", "ﬁ", "½", "Ⅳ", "①", "¨", "…", "“", "日本", "한국", "नि"),
    *("😀", "👩\u200d👩\u200d👧", "🇫🇷", "❤\ufe0f", "</s>", "<pad>", "<unk>", "<s>", "<extra_id_0>", "<extra_id_99>"),
    *("<extra_id_100>", "<extra_id_", "</S>", "_", "\\n", "<|im_end|>"),
)
LONG = ("a red circle moves to the left. " * 60, "x" * 900, "日" * 700, "<extra_id_7>" * 300)
PROMPTS = ["a red circle moves to the left.", "", "A PANDA, dressed in a small jacket\n plays </s> 12 café 😀"]


@pytest.fixture(scope="module", params=RULES)
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    path = train_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)
    return Tokenizer(path), T5Tokenizer.from_pretrained(path.parent)


def ids_of_both(tokenizers: tuple[Tokenizer, Any], text: str, max_length: int) -> tuple[list[int], list[int]]:
    ours, theirs = tokenizers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = ours.encode([text], max_length)[0].tolist()
    return got, theirs(text, padding="max_length", max_length=max_length, truncation=True).input_ids


def test_ids_of_fragments_in_every_context(tokenizers: tuple[Tokenizer, Any]) -> None:
    contexts = ["{0}", "a{0}", "{0}b", "a{0}b", "a {0} b", "{0}{0}", " {0}", "{0} ", "\n{0}\n"]
    for fragment in FRAGMENTS:
        for context in contexts:
            got, expected = ids_of_both(tokenizers, context.format(fragment), 24)
            assert got == expected, ascii(context.format(fragment))


def test_ids_of_random_mixtures(tokenizers: tuple[Tokenizer, Any]) -> None:
    draw = random.Random(0)
    # A joiner after a space, or before one, makes a cluster: see `test_marks_that_transformers_loses`.
    fragments = [f for f in FRAGMENTS if f not in ("\u200b", "\xad")]
    for _ in range(500):
        text = "".join(draw.choices(fragments, k=draw.randint(0, 12)))
        got, expected = ids_of_both(tokenizers, text, 40)
        assert got == expected, ascii(text)


def test_ids_of_every_character(tokenizers: tuple[Tokenizer, Any]) -> None:
    """All of the two lowest planes, between letters, a thousand to a text; surrogates are no text."""
    points = [p for p in range(1, 0x20000) if not 0xD800 <= p < 0xE000]
    for i in range(0, len(points), 1000):
        text = " ".join(f"a{chr(p)}b" for p in points[i : i + 1000])
        got, expected = ids_of_both(tokenizers, text, 8000)
        assert got == expected, hex(points[i])


@pytest.mark.parametrize("max_length", [1, 2, 226])
@pytest.mark.parametrize("text", LONG, ids=["words", "letters", "unknown", "sentinels"])
def test_truncation_keeps_the_end(tokenizers: tuple[Tokenizer, Any], text: str, max_length: int) -> None:
    got, expected = ids_of_both(tokenizers, text, max_length)
    assert got == expected
    assert [i for i in got if i != 0][-1] == 1  # a run of unknown characters is one token, so padding may follow


def joins(character: str) -> bool:
    """Say whether a character may form a cluster with its neighbours."""
    return unicodedata.category(character)[0] == "M" or unicodedata.category(character) in ("Cf", "Lm", "Sk")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]).filter(lambda c: not joins(c)), max_size=60),
    glue=st.sampled_from([" ", "", "\n", "a", "</s>"]),
)
def test_ids_of_any_text(tokenizers: tuple[Tokenizer, Any], text: str, glue: str) -> None:
    got, expected = ids_of_both(tokenizers, text + glue + text, 150)
    assert got == expected


def test_marks_that_transformers_loses(tmp_path: Path) -> None:
    """The one exception: a letter with two marks keeps both, as in sentencepiece, not only the first."""
    path = train_tokenizer(tmp_path, "nmt_nfkc")
    text = "e\u0302\u0301"
    got, theirs = ids_of_both((Tokenizer(path), T5Tokenizer.from_pretrained(tmp_path)), text, 4)
    model: Any = SentencePieceProcessor(model_file=str(path))
    assert got[:3] == [*model.encode(text), 1]
    assert theirs[:2] == [*model.encode("ê"), 1]


@pytest.mark.parametrize("extra_ids", [0, 100])
@pytest.mark.parametrize("rule", RULES)
def test_tokenizer_of_a_saved_directory(tmp_path: Path, rule: str, extra_ids: int) -> None:
    save_text_parts(tmp_path, rule=rule, extra_ids=extra_ids)
    ours, theirs = load_text_encoder(tmp_path).tokenizer, T5Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert ours.vocab_size == len(theirs)
    for text in ("a red <extra_id_3> circle", "x</s>y", *PROMPTS):
        got, expected = ids_of_both((ours, theirs), text, 60)
        assert got == expected


def test_a_vocabulary_larger_than_the_embedding_runs_as_in_diffusers(tmp_path: Path) -> None:
    encoder, _ = save_text_parts(tmp_path)
    encoder.resize_token_embeddings(
        len(SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "spiece.model")))
    )
    encoder.save_pretrained(tmp_path / "text_encoder")
    ours = load_text_encoder(tmp_path)
    assert ours.tokenizer.vocab_size > ours.t5.config.vocab_size
    prompts = ["a red circle moves to the left.", ""]
    expected = diffusers_embeds(tmp_path, torch.float32, 16, prompts=prompts)
    assert rel_rms(ours(prompts, 16), expected) <= TEXT_FP32


def diffusers_embeds(
    directory: Path, dtype: torch.dtype, max_length: int, device: str = "cpu", prompts: Sequence[str] = PROMPTS
) -> torch.Tensor:
    encoder: Any = T5EncoderModel.from_pretrained(directory / "text_encoder", dtype=dtype)
    encoder.to(device)
    tokenizer = T5Tokenizer.from_pretrained(directory / "tokenizer")
    pipe = CogVideoXPipeline(tokenizer, encoder, None, None, None)  # pyright: ignore
    with torch.no_grad():
        return pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_length)[0]


@pytest.mark.parametrize("max_length", [5, 48])
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one-file", "sharded"])
def test_prompt_embeds_fp32(tmp_path: Path, shard: str, max_length: int) -> None:
    save_text_parts(tmp_path, shard=shard)
    assert (tmp_path / "text_encoder" / "model.safetensors.index.json").exists() == (shard == "20KB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = load_text_encoder(tmp_path, dtype="float32")(PROMPTS, max_length)
    expected = diffusers_embeds(tmp_path, torch.float32, max_length)
    assert ours.shape == (3, max_length, 40)
    assert rel_rms(ours, expected) <= TEXT_FP32


# Without padding, because padding repeats one token and so one rounding error.
FILLED = [f"the {word} circle moves up and down, " * 3 for word in ("red", "blue", "green", "white", "small", "still")]


def test_prompt_embeds_bf16(tmp_path: Path) -> None:
    """The weights are stored in bf16, so the fp64 truth and both bf16 runs use the same; over four seeds."""
    errors = []
    for seed in range(4):
        directory = tmp_path / str(seed)
        save_text_parts(directory, dtype=torch.bfloat16, seed=seed)
        ours = load_text_encoder(directory, dtype="bfloat16")(FILLED, 32)
        truth = diffusers_embeds(directory, torch.float64, 32, prompts=FILLED)
        theirs = diffusers_embeds(directory, torch.bfloat16, 32, prompts=FILLED)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        errors.append((rel_rms(ours, truth), rel_rms(theirs, truth)))
    assert pooled_ratio(errors) <= LOW_PRECISION_TEXT


@pytest.mark.gpu
def test_prompt_embeds_fp16(tmp_path: Path) -> None:
    """On a GPU, because a CPU does not run fp16 here; `wo` is fp32 in both."""
    save_text_parts(tmp_path, dtype=torch.float16)
    encoder = load_text_encoder(tmp_path, device="cuda", ops="torch")
    stored = {name: tensor.dtype for name, tensor in encoder.t5.state_dict().items()}
    assert all(dtype == (torch.float32 if ".wo." in name else torch.float16) for name, dtype in stored.items())
    ours = encoder(FILLED, 32).cpu()
    truth = diffusers_embeds(tmp_path, torch.float64, 32, prompts=FILLED)
    theirs = diffusers_embeds(tmp_path, torch.float16, 32, "cuda", FILLED).cpu()
    assert ours.dtype == theirs.dtype == torch.float16
    assert rel_rms(ours, truth) <= LOW_PRECISION_TEXT * rel_rms(theirs, truth)

"""Text encoder: loading, ops and errors."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5EncoderModel

from cogvid.models.text import TextEncoder, Tokenizer, use_ops
from cogvid.ops import Ops, rms_norm
from cogvid.weights.hub import PACKS
from cogvid.weights.load import load_text_encoder
from measure import rel_rms
from tests.tiny_text import save_text_parts, train_tokenizer
from tests.tolerances import TEXT_FP32
from tiny_world import corpus

PROMPTS = ["a red circle", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    save_text_parts(root)
    return root


def test_ids_by_hand(checkpoint: Path) -> None:
    tokenizer = load_text_encoder(checkpoint).tokenizer
    ids = tokenizer.encode(["", "</s><pad>", "<extra_id_0><extra_id_99>"], 4)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[1, 0, 0, 0], [1, 0, 1, 0], [tokenizer.vocab_size - 1, tokenizer.vocab_size - 100, 1, 0]]


def test_prompts_do_not_see_each_other(checkpoint: Path) -> None:
    encoder = load_text_encoder(checkpoint)
    together = encoder(PROMPTS, 12)
    for row, prompt in zip(together, PROMPTS, strict=True):
        torch.testing.assert_close(row, encoder([prompt], 12)[0], rtol=1e-5, atol=1e-5)


def test_padding_is_attended(checkpoint: Path) -> None:
    """There is no mask, so the same text has other embeddings in a longer row."""
    encoder = load_text_encoder(checkpoint)
    assert not torch.allclose(encoder(PROMPTS, 12)[:, :5], encoder(PROMPTS, 24)[:, :5], atol=1e-3)


class Counted:
    """Ops that note the shape of each input of `rms_norm`."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.ops = dataclasses.replace(Ops.torch(), rms_norm=self.rms_norm)

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return rms_norm(x, weight, eps=eps)


def test_every_norm_runs_on_the_op(checkpoint: Path) -> None:
    counted = Counted()
    encoder = load_text_encoder(checkpoint, ops=counted.ops)
    expected = load_text_encoder(checkpoint, ops="torch")(PROMPTS, 8)
    assert torch.equal(encoder(PROMPTS, 8), expected)
    assert counted.shapes == [(2, 8, 40)] * 7  # two in each of three layers, and the last


def test_ops_can_be_set_later(checkpoint: Path) -> None:
    encoder = load_text_encoder(checkpoint, ops="torch")
    first, second = Counted(), Counted()
    expected = encoder(PROMPTS, 8)
    for counted in (first, second):
        encoder.set_ops(counted.ops)
        assert torch.equal(encoder(PROMPTS, 8), expected)
    assert len(first.shapes) == len(second.shapes) == 7
    encoder.set_ops(Ops.torch())
    encoder(PROMPTS, 8)
    assert len(second.shapes) == 7


def test_ops_can_be_set_on_a_model_of_transformers(checkpoint: Path) -> None:
    t5 = T5EncoderModel.from_pretrained(checkpoint / "text_encoder")
    encoder = TextEncoder(t5, load_text_encoder(checkpoint).tokenizer, torch.device("cpu"))
    counted = Counted()
    encoder.set_ops(counted.ops)
    encoder(PROMPTS, 8)
    assert len(counted.shapes) == 7


def test_use_ops_keeps_names_and_weights(checkpoint: Path) -> None:
    model = T5EncoderModel.from_pretrained(checkpoint / "text_encoder")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    use_ops(model, Ops.torch())
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_embedding_under_either_name(checkpoint: Path, tmp_path: Path) -> None:
    expected = load_text_encoder(checkpoint)(PROMPTS, 8)
    stored = load_file(checkpoint / "text_encoder" / "model.safetensors")
    shared = stored.pop("shared.weight")
    stored.pop("encoder.embed_tokens.weight", None)
    for names in (["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]):
        root = copy_of(checkpoint, tmp_path / str(names))
        save_file(stored | {name: shared.clone() for name in names}, root / "text_encoder" / "model.safetensors")
        encoder = load_text_encoder(root)
        # Not bit for bit: the matrices have other addresses in the file, and a BLAS may order its sums by address.
        assert rel_rms(encoder(PROMPTS, 8), expected) <= TEXT_FP32
        assert encoder.t5.shared is encoder.t5.encoder.embed_tokens


def copy_of(checkpoint: Path, root: Path) -> Path:
    for path in checkpoint.rglob("*"):
        if path.is_file():
            target = root / path.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return root


def test_float16_checkpoint_on_a_cpu(tmp_path: Path) -> None:
    save_text_parts(tmp_path, dtype=torch.float16)
    with pytest.warns(UserWarning, match="float16 arithmetic is not run on a CPU"):
        encoder = load_text_encoder(tmp_path)
    assert encoder.dtype in (torch.float32, torch.bfloat16)
    embeds = load_text_encoder(tmp_path, dtype="float32")(PROMPTS, 8)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(encoder(PROMPTS, 8).float(), embeds, rtol=0, atol=0.1)


def test_weights_stay_mapped(checkpoint: Path) -> None:
    """The parameters are the mapped file, not a copy: same dtype, no gradient, nothing left on the meta device."""
    encoder = load_text_encoder(checkpoint)
    assert all(not p.requires_grad and p.device.type == "cpu" for p in encoder.t5.parameters())
    names = [line.rsplit(maxsplit=1)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    assert str((checkpoint / "text_encoder" / "model.safetensors").resolve()) in names


def test_truncation_warns_and_names_the_prompt(checkpoint: Path) -> None:
    tokenizer = load_text_encoder(checkpoint).tokenizer
    with pytest.warns(UserWarning, match=r"prompt 'a red circle.*the last 1 are not used"):
        cut = tokenizer.encode(["a red circle <unk>"], 4)
    assert cut[0, -1] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["a red circle"], 4)


@pytest.mark.parametrize(
    ("prompts", "max_length", "message"),
    [
        ("a red circle", 8, "prompts: got str 'a red circle', want a list of str"),
        ([None], 8, r"prompts: got list [None], want a list of str"),
        (["a"], 0, "max_length: got 0, want at least 1"),
    ],
    ids=["str", "none", "length"],
)
def test_wrong_arguments(checkpoint: Path, prompts: list[str], max_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        load_text_encoder(checkpoint)(prompts, max_length)
    assert message in str(error.value)


def test_broken_checkpoints_are_named(checkpoint: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return copy_of(checkpoint, tmp_path / name)

    root = broken("no-spiece")
    (root / "tokenizer" / "spiece.model").unlink()
    with pytest.raises(ValueError, match=r"spiece\.model: got no file, want a sentencepiece model$"):
        load_text_encoder(root)

    root = broken("bad-spiece")
    (root / "tokenizer" / "spiece.model").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"spiece\.model: got a broken file .+, want a sentencepiece model$"):
        load_text_encoder(root)

    root = broken("bad-config")
    (root / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: got .*, want a JSON file"):
        load_text_encoder(root)

    for values, words in (
        ({"num_heads": "x"}, r"config\.json: num_heads: got 'x', want a positive integer, at most 1048576$"),
        ({"dense_act_fn": "nope"}, r"config\.json: dense_act_fn: got 'nope', want '.*' as feed_forward_proj .* has$"),
        ({"dense_act_fn": None}, r"config\.json: dense_act_fn: got None, want '.*' as feed_forward_proj .* has$"),
        ({"d_kv": -1}, r"config\.json: d_kv: got -1, want a positive integer, at most 1048576$"),
        ({"num_layers": 2**31}, r"config\.json: num_layers: got 2147483648, want a positive integer, at most 1000$"),
        ({"relative_attention_num_buckets": 2}, r"relative_attention_num_buckets: got 2, want at least 4$"),
        ({"relative_attention_max_distance": 1}, r"relative_attention_max_distance: got 1, want more than \d+$"),
        ({"feed_forward_proj": "x" * 1000}, r"feed_forward_proj: got 'x+\.\.\., want one of relu, .*, gated-silu$"),
    ):
        root = broken(f"config-{next(iter(values))}")
        config = json.loads((root / "text_encoder" / "config.json").read_text())
        (root / "text_encoder" / "config.json").write_text(json.dumps(config | values))
        with pytest.raises(ValueError, match=words) as caught:
            load_text_encoder(root)
        assert "\n" not in str(caught.value)

    root = broken("list")
    (root / "text_encoder" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: got list, want a JSON object$"):
        load_text_encoder(root)

    root = broken("sentinels")
    (root / "tokenizer" / "tokenizer_config.json").write_text('{"extra_ids": "many"}')
    with pytest.raises(ValueError, match=r"extra_ids: got 'many', want an integer, 0 to 10000$"):
        load_text_encoder(root)

    root = broken("missing-weight")
    path = root / "text_encoder" / "model.safetensors"
    state = load_file(path)
    del state["encoder.block.1.layer.0.layer_norm.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"got .*encoder.block.1.layer.0.layer_norm.weight"):
        load_text_encoder(root)

    root = broken("missing-embedding")
    path = root / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "shared" not in k and "embed_tokens" not in k}, path)
    with pytest.raises(ValueError, match=r"got .*shared.weight"):
        load_text_encoder(root)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn]
)
def test_one_tensor_that_is_no_weight_is_refused(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    if dtype == torch.complex64:
        pytest.importorskip("safetensors", minversion="0.7")  # older ones write no complex numbers
    root, name = copy_of(checkpoint, tmp_path), "encoder.block.1.layer.0.layer_norm.weight"
    path = root / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file(state | {name: state[name].to(dtype)}, path)
    with pytest.raises(
        ValueError, match=rf"text_encoder/model\.safetensors: got 1 tensors \({name} is \w+\), want weights in"
    ):
        load_text_encoder(root)


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one-file", "sharded"])
def test_a_variant_of_the_encoder(tmp_path: Path, shard: str) -> None:
    encoder, _ = save_text_parts(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    encoder.save_pretrained(tmp_path / "text_encoder", variant="fp16", max_shard_size=shard)
    with pytest.raises(ValueError, match=r"^variant: got None, want 'fp16': .*text_encoder has no other$"):
        load_text_encoder(tmp_path)
    ours = load_text_encoder(tmp_path, variant="fp16")
    assert torch.equal(ours.t5.shared.weight, encoder.shared.weight)


def test_ids_that_have_no_embedding_are_refused_when_they_occur(checkpoint: Path, tmp_path: Path) -> None:
    """A vocabulary larger than the embedding is allowed, as in diffusers."""
    root = copy_of(checkpoint, tmp_path)
    path = root / "text_encoder" / "model.safetensors"
    tokenizer = load_text_encoder(checkpoint).tokenizer
    size = tokenizer.vocab_size - 100  # without the sentinels
    state = load_file(path)
    save_file({k: v[:size].clone() if v.shape == state["shared.weight"].shape else v for k, v in state.items()}, path)
    config = json.loads((root / "text_encoder" / "config.json").read_text())
    (root / "text_encoder" / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    encoder = load_text_encoder(root)
    assert torch.equal(encoder(PROMPTS, 8), load_text_encoder(checkpoint)(PROMPTS, 8))
    words = rf"^prompt: got 'red <extra_id_99>' with the piece '<extra_id_99>' of id {size}, want ids below {size}, "
    with pytest.raises(ValueError, match=words):
        encoder(["a red circle", "red <extra_id_99>"], 8)


def test_unknown_words_are_named(checkpoint: Path) -> None:
    tokenizer = load_text_encoder(checkpoint).tokenizer
    with pytest.warns(UserWarning, match=r"^prompt 'a red 猫 circle': '猫' is not in the vocabulary of the text"):
        tokenizer.encode(["a red 猫 circle"], 12)
    with pytest.warns(UserWarning, match=r"'猫', 'ж', '犬', '鳥', '魚' and 2 more are not in the vocabulary"):
        tokenizer.encode(["猫, ж! 犬 猫 鳥 魚 馬 山"], 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["", "a red circle moves to the left.", "circle, <unk> </s>", "<extra_id_3>red"], 20)


def test_a_large_vocabulary_spells_words_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 splits rare words into pieces, so there only words with the unknown piece are unknown."""
    monkeypatch.setattr("cogvid.media.tokenizer._WORD_LIST", 10)
    tokenizer = Tokenizer(train_tokenizer(tmp_path, "nmt_nfkc"))
    assert tokenizer.unknown_words("a bison 猫 dressed") == ["猫"]


@pytest.mark.parametrize("pack", ["tiny-i2v", "tiny-t2v"])
def test_shipped_packs_name_what_is_outside_their_world(pack: str) -> None:
    tokenizer = load_text_encoder(PACKS / pack).tokenizer
    assert [s for sentence in corpus() for s in tokenizer.unknown_words(f"{sentence} {sentence.capitalize()}")] == []
    assert tokenizer.unknown_words("A panda eats the red BAMBOO, 2 fights.") == [
        "panda",
        "eats",
        "BAMBOO",
        "2",
        "fights",
    ]


def test_model_without_pad_is_refused(tmp_path: Path) -> None:
    path = train_tokenizer(tmp_path, "identity")
    assert Tokenizer(path, extra_ids=0).vocab_size < Tokenizer(path).vocab_size
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(["a red circle"] * 9),
        model_prefix=str(tmp_path / "other"),
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"got no pad token, want a T5 model$"):
        Tokenizer(tmp_path / "other.model")

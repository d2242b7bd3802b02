"""The verification of official checkpoints, rehearsed on the shipped packs and on random checkpoints of every kind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import references
import verify_official
from cogvid.config import CONFIGS
from cogvid.weights.hub import find
from references import save_pipeline, tiny_pipeline

COLUMNS = verify_official.COLUMNS
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: Any) -> None:
        raise AssertionError(f"connects to {address[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def cells(out: str) -> dict[str, str]:
    """Return the row of the table, which is the last line, by the names of the columns above it."""
    head, _, row = (line.strip("| ").split(" | ") for line in out.splitlines()[-3:])
    assert len(head) == len(row)
    return dict(zip(head, row, strict=True))


def custom(directory: Path, variant: str) -> Path:
    """Write a tiny checkpoint with diffusers, in the dtypes of the official ones."""
    pytest.importorskip("diffusers", reason="needs diffusers")
    pipe, spiece = tiny_pipeline(variant)
    pipe.transformer.to(torch.bfloat16)
    return save_pipeline(pipe, spiece, directory)


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["tiny-i2v", "tiny-t2v"])
def test_shipped_packs_pass(pack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    file = tmp_path / "found.json"
    assert verify_official.main([pack, "--device", "cpu", "--steps", "2", "--json", str(file)]) == 0
    row = cells(capsys.readouterr().out)
    assert row["checkpoint"] == f"{pack} ({pack})"
    assert row["within bounds"] == "yes"
    assert row["size"].startswith("17 frames 64x64, 2 steps; peak ")
    for name in ("VAE encode", "VAE decode", "transformer", "run, latents", "run, pixels"):
        fp32, ratio = map(float, row[name].split("; "))
        assert 0 < fp32 < 2e-5, name
        assert 0.1 < ratio < 1.5, name
    assert float(row["tokenizer"]) == 0
    values = json.loads(file.read_text())
    assert values["passed"]
    assert {f["column"] for f in values["findings"]} == set(COLUMNS)
    assert {f["dtype"] for f in values["findings"]} == {"", "fp32", "bf16"}
    assert all(min(f["gib"]) > 0.1 for f in values["findings"] if f["dtype"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_every_kind_of_checkpoint_passes(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sin-cos, learned and sliced rotary positions; temporal patches, ofs; an image and none."""
    size = ["--height", "64", "--width", "96"] if variant.startswith("1.5") else []  # its own is 2400x2400
    arguments = [str(custom(tmp_path, variant)), "--device", "cpu", "--dtypes", "fp32", *size]
    assert verify_official.main(arguments) == 0
    row = cells(capsys.readouterr().out)
    assert all(0 <= float(row[name]) < 1e-4 for name in COLUMNS)


@pytest.mark.slow
def test_an_unlike_weight_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")

    def wrong(*args: Any, **options: Any) -> Any:
        vae = load_vae(*args, **options)
        next(p for name, p in vae.named_parameters() if name.endswith("conv_out.weight")).mul_(1.001)
        return vae

    load_vae = verify_official.load_vae
    monkeypatch.setattr(verify_official, "load_vae", wrong)
    assert verify_official.main(["tiny-t2v", "--device", "cpu", "--parts", "scheduler", "vae", "--dtypes", "fp32"]) == 1
    out = capsys.readouterr().out
    assert cells(out)["within bounds"] == "no: VAE encode fp32 torch"
    assert out.count("EXCEEDED") == 1


def test_nan_and_a_wrong_token_exceed_every_bound() -> None:
    assert not verify_official.Finding("run", "run, latents", "fp32", "torch", float("nan"), 0.0).passed
    assert not verify_official.Finding("vae", "VAE encode", "bf16", "torch", float("nan"), 0.0, 1e-3).passed
    assert not verify_official.Finding("vae", "VAE encode", "bf16", "torch", 1e-9, 0.0, 0.0).passed
    assert not verify_official.Finding("tokenizer", "tokenizer", "", "", 1e-9, 1.0).passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "model: got 'no-such-model'"),
        (["tiny-t2v", "--height", "40"], "height: got 40"),
        (["tiny-t2v", "--num-frames", "5"], "num_frames: got 5"),
        (["tiny-t2v", "--steps", "0"], "steps: got 0"),
        (["tiny-t2v", "--dtypes", "fp16", "--device", "cpu"], "dtypes: got fp16"),
        (["tiny-t2v", "--device", "tpu"], "device: got 'tpu'"),
        (["tiny-t2v", "--parts", "nothing"], "argument --parts: invalid choice: 'nothing'"),
        (["tiny-t2v", "--json", "/no/such/place/x.json"], "json: got /no/such/place/x.json"),
        (["a/b", "--local-files-only"], "model: got 'a/b' without network access, want a directory"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_official.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"verify_official: error: {message}")
    assert err.count("\n") == 1


def test_without_diffusers_it_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "diffusers.py").write_text("raise ImportError('no diffusers here')")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "verify_official.py", "tiny-t2v", "--device", "cpu"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "verify_official: error: no diffusers here\n"


def test_the_commit_is_what_the_hubs_client_noted(tmp_path: Path) -> None:
    cached = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    assert verify_official.commit_of(cached) == "0123abcd"
    note = tmp_path / "own" / ".cache" / "huggingface" / "download" / "model_index.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("89abcdef\netag\n1700000000.0\n")
    assert verify_official.commit_of(tmp_path / "own") == "89abcdef"
    assert verify_official.commit_of(find("tiny-t2v")) is None


@pytest.mark.slow
def test_what_the_hub_is_asked_for_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the tokenizer only spiece.model is fetched; transformers must read it alone."""
    directory = custom(tmp_path, "5b")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / "tokenizer" / file).unlink(missing_ok=True)
    config = directory / "text_encoder" / "config.json"
    assert json.loads(config.read_text())["vocab_size"] < 250  # fewer than with the 100 extra ids of T5
    shutil.rmtree(directory / "text_encoder")
    from tests.tiny_text import tiny_encoder

    tiny_encoder(320).save_pretrained(directory / "text_encoder")
    assert verify_official.main([str(directory), "--device", "cpu", "--parts", "text"]) == 0
    assert float(cells(capsys.readouterr().out)["tokenizer"]) == 0


@pytest.mark.slow
def test_a_checkpoint_of_real_width_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers of 5B's width and the whole of the official VAE, random, as diffusers writes them."""
    pytest.importorskip("diffusers", reason="needs diffusers")
    pipe, spiece = tiny_pipeline("5b", num_attention_heads=48, attention_head_dim=64, num_layers=2, time_embed_dim=512)
    torch.manual_seed(0)
    references.randomise(pipe.transformer).to(torch.bfloat16)
    pipe.register_modules(vae=references.randomise(references.diffusers_vae(CONFIGS["cogvideox-5b"].vae)))
    assert verify_official.main([str(save_pipeline(pipe, spiece, tmp_path)), "--device", "cpu"]) == 0
    print(capsys.readouterr().out)

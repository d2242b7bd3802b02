"""Recognising and refusing checkpoints; what loading costs."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvid.config import CONFIGS, ScheduleConfig, TransformerConfig, VAEConfig
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.weights.checkpoint import CLASSES, load_schedule_config, read_model_config
from cogvid.weights.files import load_state
from cogvid.weights.hub import component_variants
from cogvid.weights.load import load_transformer, load_vae, save_vae
from cogvid.weights.names import TRANSFORMER_NAMES, VAE_NAMES, unmap_state_dict
from tests.checkpoints import TRANSFORMER, VAE_CONFIG, WEIGHTS, digest, edit_json, write_checkpoint, write_json


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, to damage."""
    return shutil.copytree(pristine, tmp_path / "checkpoint")


# Recognition.


def test_an_unknown_model_has_the_settings_of_its_configs(pristine: Path) -> None:
    model = read_model_config(pristine)
    assert (model.name, model.repo, model.dtype) == ("custom-t2v", None, "float32")
    assert (model.height, model.width, model.num_frames, model.max_frames) == (64, 96, 17, 17)
    assert (model.fps, model.frame_multiple) == (8, 8)
    assert (model.transformer, model.vae) == (TRANSFORMER, VAE_CONFIG)
    assert model.schedule == ScheduleConfig(snr_shift_scale=1.0)


@pytest.mark.parametrize("name", [name for name, model in CONFIGS.items() if model.repo])
def test_official_models_are_recognised_by_their_config(tmp_path: Path, name: str) -> None:
    known = CONFIGS[name]
    directory = tmp_path / "cogvideox-2b"  # a name that lies for four of the five
    class_name = "CogVideoXImageToVideoPipeline" if known.conditions else "CogVideoXPipeline"
    write_json(
        directory / "model_index.json",
        {"_class_name": class_name, **{part: ["library", classes[0]] for part, classes in CLASSES.items()}},
    )
    write_json(
        directory / "transformer" / "config.json",
        {"_class_name": "CogVideoXTransformer3DModel", **known.transformer.to_dict()},
    )
    write_json(directory / "vae" / "config.json", {"_class_name": "AutoencoderKLCogVideoX", **known.vae.to_dict()})
    write_json(
        directory / "scheduler" / "scheduler_config.json",
        {"_class_name": "CogVideoXDDIMScheduler", **known.schedule.to_dict()},
    )
    write_json(directory / "text_encoder" / "config.json", {"d_model": 4096})
    assert read_model_config(directory) == known
    # 1.5 is hosted with sizes that mean nothing; those of 1.0 are what the model was made for.
    edit_json(directory / "transformer" / "config.json", sample_height=96, sample_width=170)
    model = read_model_config(directory)
    assert model.name == name
    official = known.transformer.patch_size_t is not None
    assert (model.height, model.width) == ((known.height, known.width) if official else (768, 1360))


def test_a_15_style_image_model_is_recognised(tmp_path: Path) -> None:
    config = dataclasses.replace(TRANSFORMER, in_channels=32, patch_size_t=2, ofs_embed_dim=32)
    model = read_model_config(write_checkpoint(tmp_path, config))
    assert (model.name, model.fps, model.frame_multiple) == ("custom-i2v", 16, 16)


def test_scheduler_config(pristine: Path) -> None:
    expected = ScheduleConfig(snr_shift_scale=1.0)
    assert load_schedule_config(pristine) == load_schedule_config(pristine / "scheduler") == expected


def test_a_scheduler_setting_that_is_not_named_is_the_default_of_the_class(checkpoint: Path) -> None:
    path = checkpoint / "scheduler" / "scheduler_config.json"
    write_json(path, {"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 2.0})
    found = load_schedule_config(checkpoint)
    assert found == ScheduleConfig(
        clip_sample=True, prediction_type="epsilon", timestep_spacing="leading", rescale_betas_zero_snr=False,
        snr_shift_scale=2.0,
    )  # fmt: skip
    assert read_model_config(checkpoint).schedule == found


# What is refused, and in which words: (what is done to a good checkpoint, what is said).

Damage = Callable[[Path], Any]


def drop_tensor(path: Path, name: str, rename: str | None = None) -> None:
    state = load_file(path)
    tensor = state.pop(name)
    save_file({**state, rename: tensor} if rename else state, path)


def reshape_tensor(path: Path, name: str) -> None:
    state = load_file(path)
    save_file({**state, name: torch.cat([state[name]] * 2)}, path)


def shard(directory: Path, second: str = "b.safetensors") -> None:
    """Split the weights of a directory into two files and an index, which gives the second another name."""
    state = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, directory / file)
    listed = {name: (second if file == "b.safetensors" else file) for file, part in halves.items() for name in part}
    write_json(directory / f"{WEIGHTS}.index.json", {"weight_map": listed})


FFN = "transformer_blocks.1.ff.net.2.weight"
NO_FILE, NO_JSON = r"\.json: got no such file, want a JSON file$", r"\.json: got .*, want a JSON file$"
BROKEN = r"got a broken file \(.*\), want a whole safetensors file$"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no-model-index": (
        lambda d: (d / "model_index.json").unlink(),
        "model_index" + NO_FILE,
    ),
    "empty-model-index": (
        lambda d: (d / "model_index.json").write_text(""),
        "model_index" + NO_JSON,
    ),
    "broken-model-index": (
        lambda d: (d / "model_index.json").write_text('{"a": '),
        "model_index" + NO_JSON,
    ),
    "binary-model-index": (
        lambda d: (d / "model_index.json").write_bytes(b"\xff\x00"),
        "index" + NO_JSON,
    ),
    "model-index-is-a-list": (lambda d: (d / "model_index.json").write_text("[]"), r"want a JSON object$"),
    "other-pipeline": (
        lambda d: edit_json(d / "model_index.json", _class_name="FluxPipeline"),
        r"got class FluxPipeline, want CogVideoXPipeline or CogVideoXVideoToVideoPipeline or CogVideoXImage",
    ),
    "wrong-task": (
        lambda d: edit_json(d / "model_index.json", _class_name="CogVideoXImageToVideoPipeline"),
        r"got a transformer with in_channels 16, want 32 as the other parts have$",
    ),
    "other-vae-class": (
        lambda d: edit_json(d / "model_index.json", vae=["diffusers", "AutoencoderKL"]),
        r"got vae of class AutoencoderKL, want AutoencoderKLCogVideoX$",
    ),
    "component-null": (lambda d: edit_json(d / "model_index.json", vae=[None, None]), r"got vae of class None, want"),
    "text-width": (
        lambda d: edit_json(d / "text_encoder" / "config.json", d_model=512),
        r"got a transformer with text_embed_dim 48, want 512 as the other parts have$",
    ),
    "no-config": (
        lambda d: (d / "transformer" / "config.json").unlink(),
        "transformer/config" + NO_FILE,
    ),
    "broken-config": (
        lambda d: (d / "vae" / "config.json").write_text("{"),
        "vae/config" + NO_JSON,
    ),
    "wrong-class": (
        lambda d: edit_json(d / "transformer" / "config.json", _class_name="UNet2DModel"),
        r"got class UNet2DModel, want CogVideoXTransformer3DModel$",
    ),
    "another-activation": (
        lambda d: edit_json(d / "transformer" / "config.json", activation_fn="geglu"),
        r"config\.json: activation_fn: got 'geglu', want 'gelu-approximate': no other is implemented$",
    ),
    "quant-conv": (
        lambda d: edit_json(d / "vae" / "config.json", use_quant_conv=True),
        r"use_quant_conv: got True, want False: no other",
    ),
    "config-string-for-number": (
        lambda d: edit_json(d / "transformer" / "config.json", num_layers="2"),
        r"config\.json: num_layers: got '2', want a positive integer, at most 1000$",
    ),
    "config-negative": (
        lambda d: edit_json(d / "transformer" / "config.json", num_layers=-1),
        r"num_layers: got -1, want a positive integer, at most 1000$",
    ),
    "config-nan": (
        lambda d: edit_json(d / "vae" / "config.json", scaling_factor=float("nan")),
        r"got nan, want a positive number",
    ),
    "config-list": (
        lambda d: edit_json(d / "vae" / "config.json", block_out_channels=[8, "x"]),
        r"block_out_channels: got \(8, 'x'\), want a list of 1 to 16 positive integers, at most 1048576$",
    ),
    "scheduler-beta": (
        lambda d: edit_json(d / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid"),
        r"scheduler_config\.json: beta_schedule: got 'sigmoid', want one of linear, scaled_linear, squaredcos_cap_v2$",
    ),
    "scheduler-spacing": (
        lambda d: edit_json(d / "scheduler" / "scheduler_config.json", timestep_spacing="log"),
        r"scheduler_config\.json: timestep_spacing: got 'log', want one of leading, linspace, trailing$",
    ),
    "scheduler-prediction": (
        lambda d: edit_json(d / "scheduler" / "scheduler_config.json", prediction_type="flow"),
        r"scheduler_config\.json: prediction_type: got 'flow', want one of epsilon, sample, v_prediction$",
    ),
    "scheduler-few-betas": (
        lambda d: edit_json(d / "scheduler" / "scheduler_config.json", trained_betas=[0.1] * 999),
        r"trained_betas: got 999 of them, want one for each of the 1000 num_train_timesteps$",
    ),
    "scheduler-betas-of-words": (
        lambda d: edit_json(d / "scheduler" / "scheduler_config.json", trained_betas=["a"]),
        r"trained_betas: got \('a',\), want a list of numbers or null$",
    ),
    "scheduler-offset": (
        lambda d: edit_json(d / "scheduler" / "scheduler_config.json", steps_offset=-1),
        r"steps_offset: got -1, want an integer, 0 to 10000$",
    ),
    "no-weights": (
        lambda d: (d / "vae" / WEIGHTS).unlink(),
        r"vae/diffusion_pytorch_model\.safetensors: got no such file, want a safetensors file of this name$",
    ),
    "other-weights": (
        lambda d: (d / "vae" / WEIGHTS).rename(d / "vae" / "model.fp16.safetensors"),
        r"got model\.fp16\.safetensors, want a safetensors file of this name$",
    ),
    "only-a-variant": (
        lambda d: (d / "vae" / WEIGHTS).rename(d / "vae" / "diffusion_pytorch_model.fp16.safetensors"),
        r"^variant: got None, want 'fp16': .*vae has no other$",
    ),
    "head-dim-for-rope": (
        lambda d: edit_json(d / "transformer" / "config.json", attention_head_dim=24),
        r"config\.json: attention_head_dim: got 24, want a multiple of 16 with rotary positions$",
    ),
    "width-for-added-positions": (
        lambda d: edit_json(
            d / "transformer" / "config.json", attention_head_dim=20, use_rotary_positional_embeddings=False
        ),
        r"num_attention_heads \* attention_head_dim: got \d+, want a multiple of 16 with added positions$",
    ),
    "ofs-width": (
        lambda d: edit_json(d / "transformer" / "config.json", ofs_embed_dim=6),
        r"config\.json: ofs_embed_dim: got 6, want the time_embed_dim, \d+, or null$",
    ),
    "odd-ofs-width": (
        lambda d: edit_json(d / "transformer" / "config.json", ofs_embed_dim=7, time_embed_dim=7),
        r"config\.json: ofs_embed_dim: got 7, want an even number$",
    ),
    "smaller-than-a-patch": (
        lambda d: edit_json(d / "transformer" / "config.json", sample_height=1),
        r"config\.json: sample_height: got 1, want at least the patch_size, 2$",
    ),
    "learned-positions-of-half-a-patch": (
        lambda d: edit_json(d / "transformer" / "config.json", sample_width=9, use_learned_positional_embeddings=True),
        r"config\.json: sample_width: got 9, want a multiple of the patch_size, 2, with learned positions$",
    ),
    "scale-zero": (
        lambda d: edit_json(d / "transformer" / "config.json", spatial_interpolation_scale=0),
        r"config\.json: spatial_interpolation_scale: got 0, want a positive number, 1e-12 to 1e\+09$",
    ),
    "groups": (
        lambda d: edit_json(d / "vae" / "config.json", norm_num_groups=3),
        r"config\.json: norm_num_groups: got 3, want a divisor of each of \[8, 8, 16, 16\]$",
    ),
    "temporal-compression-of-three": (
        lambda d: edit_json(d / "vae" / "config.json", temporal_compression_ratio=3),
        r"config\.json: temporal_compression_ratio: got 3, want one of \[1, 2, 4, 8\]$",
    ),
    "grey-vae": (
        lambda d: edit_json(d / "vae" / "config.json", in_channels=1),
        r"config\.json: in_channels: got 1, want 3: no other is implemented$",
    ),
    "scaling-factor-zero": (
        lambda d: edit_json(d / "vae" / "config.json", scaling_factor=0),
        r"config\.json: scaling_factor: got 0, want a positive number, 1e-12 to 1e\+09$",
    ),
    "empty-weights": (
        lambda d: (d / "vae" / WEIGHTS).write_bytes(b""),
        BROKEN,
    ),
    "git-lfs-pointer": (
        lambda d: (d / "vae" / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        ),
        BROKEN,
    ),
    "truncated-weights": (
        lambda d: os.truncate(d / "transformer" / WEIGHTS, (d / "transformer" / WEIGHTS).stat().st_size - 1),
        r"transformer/diffusion_pytorch_model\.safetensors: got a broken file \(.*\), want a whole safetensors file$",
    ),
    "truncated-header": (
        lambda d: os.truncate(d / "vae" / WEIGHTS, 100),
        BROKEN,
    ),
    "weights-directory": (
        lambda d: ((d / "vae" / WEIGHTS).unlink(), (d / "vae" / WEIGHTS).mkdir()),
        r"diffusion_pytorch_model\.safetensors: got no such file, want",
    ),
    "missing-shard": (
        lambda d: shard(d / "vae", "c.safetensors"),
        r"vae/c\.safetensors: got a\.safetensors, b\.safetensors, want a safetensors file of this name",
    ),
    "shard-elsewhere": (
        lambda d: shard(d / "vae", "../b.safetensors"),
        r"index\.json: got .*, want a 'weight_map' of tensor",
    ),
    "broken-index": (
        lambda d: (d / "vae" / f"{WEIGHTS}.index.json").write_text("{}"),
        r"index\.json: got .*, want a 'weight_map' of tensor names to file names$",
    ),
    "index-of-other-shard": (
        lambda d: (shard(d / "vae"), shutil.copy(d / "vae" / "a.safetensors", d / "vae" / "b.safetensors")),
        r"index\.json: got \d+ tensors not in the shard it names \(.*, and \d+ more\), want none$",
    ),
    "missing-tensor": (
        lambda d: drop_tensor(d / "transformer" / WEIGHTS, FFN),
        r"transformer: got weights with 1 missing \(transformer_blocks\.1\.ff\.net\.2\.weight\)",
    ),
    "renamed-tensor": (
        lambda d: drop_tensor(d / "transformer" / WEIGHTS, FFN, "transformer_blocks.1.ffn.2.weight"),
        r"1 missing \(transformer_blocks\.1\.ff\.net\.2\.weight \[nearest: transformer_blocks\.1\.ffn\.2\.weight\]\); "
        r"1 unexpected \(transformer_blocks\.1\.ffn\.2\.weight \[nearest: transformer_blocks\.1\.ff\.net\.2\.",
    ),
    "another-shape": (
        lambda d: reshape_tensor(d / "vae" / WEIGHTS, "decoder.conv_out.conv.bias"),
        r"vae: got weights with 1 of another shape \(decoder\.conv_out\.conv\.bias is \[6\], want \[3\]\), want",
    ),
    "more-layers-than-configured": (
        lambda d: edit_json(d / "transformer" / "config.json", num_layers=1),
        r"got weights with \d+ unexpected \(transformer_blocks\.1\..* \[nearest: transformer_blocks\.0\..*",
    ),
    "integer-weights": (
        lambda d: save_file(
            {k: v.to(torch.int8) for k, v in load_file(d / "vae" / WEIGHTS).items()}, d / "vae" / WEIGHTS
        ),
        r"vae/diffusion_pytorch_model\.safetensors: got \d+ tensors \(.* is int8, .* is int8, .* is int8, and "
        r"\d+ more\), want weights in float32, float16, bfloat16 alone$",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(checkpoint: Path, damage: str) -> None:
    do, words = DAMAGES[damage]
    do(checkpoint)
    with pytest.raises(ValueError, match=words) as caught:
        load_all(checkpoint)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_the_undamaged_checkpoint_loads(pristine: Path) -> None:
    load_all(pristine)


def load_all(checkpoint: Path) -> None:
    model = read_model_config(checkpoint)
    assert load_vae(checkpoint).config == model.vae
    assert load_transformer(checkpoint).config == model.transformer


def test_a_sharded_checkpoint_loads(checkpoint: Path) -> None:
    whole = load_state(checkpoint / "vae")
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    shard(checkpoint / "vae")
    state = unmap_state_dict(load_vae(checkpoint))
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


FOREIGN = [
    *(torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("dtype", FOREIGN, ids=str)
def test_one_tensor_that_is_no_weight_is_refused(checkpoint: Path, dtype: torch.dtype, sharded: bool) -> None:
    if dtype == torch.complex64:
        pytest.importorskip("safetensors", minversion="0.7")  # older ones write no complex numbers
    for part, name in (("transformer", FFN), ("vae", "decoder.conv_out.conv.bias")):
        state = load_file(checkpoint / part / WEIGHTS)
        save_file({**state, name: state[name].to(dtype)}, checkpoint / part / WEIGHTS)
        if sharded:
            shard(checkpoint / part)
    for part, load, name in (("transformer", load_transformer, FFN), ("vae", load_vae, "decoder.conv_out.conv.bias")):
        with pytest.raises(ValueError, match=r"safetensors: got 1 tensors \(.*\), want weights in float32") as caught:
            load(checkpoint)
        assert f"/{part}/" in str(caught.value)
        assert f"({name} is " in str(caught.value)


# Variants.


def test_a_variant_is_loaded_when_asked_for(checkpoint: Path) -> None:
    state = load_file(checkpoint / "vae" / WEIGHTS)
    other = {name: tensor + 1 for name, tensor in state.items()}
    save_file(other, checkpoint / "vae" / "diffusion_pytorch_model.ema.safetensors")
    assert torch.equal(load_vae(checkpoint).state_dict()["encoder.conv_in.bias"], state["encoder.conv_in.conv.bias"])
    assert torch.equal(
        load_vae(checkpoint, variant="ema").state_dict()["encoder.conv_in.bias"], other["encoder.conv_in.conv.bias"]
    )
    with pytest.raises(ValueError, match=r"^variant: got 'fp16', want None or 'ema': .*vae has no other$"):
        load_vae(checkpoint, variant="fp16")
    with pytest.raises(ValueError, match=r"^variant: got 'fp16', want None: .*transformer has no other$"):
        load_transformer(checkpoint, variant="fp16")


def test_a_part_without_the_variant_is_loaded_from_its_plain_files_and_said(checkpoint: Path) -> None:
    plain = checkpoint / "transformer" / WEIGHTS
    plain.rename(plain.with_suffix(".fp16.safetensors"))
    with pytest.warns(
        UserWarning, match=r"^variant: got 'fp16', which vae, text_encoder of .* lack: their plain files are loaded$"
    ):
        chosen = component_variants(checkpoint, "fp16")
    assert chosen == {"transformer": "fp16", "vae": None, "text_encoder": None}
    assert read_model_config(checkpoint, "fp16").dtype == "float32"
    with pytest.raises(ValueError, match=r"^variant: got None, want 'fp16': .*transformer has no other$"):
        read_model_config(checkpoint)
    with pytest.raises(ValueError, match=r"^variant: got 'bf16', want None or 'fp16': .* has no other$"):
        component_variants(checkpoint, "bf16")


# Random configs.


def check_line(error: ValueError) -> None:
    assert re.fullmatch(r"[a-z_* ]+: got .*, want .*", str(error))


@pytest.mark.parametrize("seed", range(100))
def test_any_transformer_config_runs_or_is_refused_when_it_is_read(seed: int) -> None:
    draw = random.Random(seed).choice
    values = {
        "num_attention_heads": draw([1, 2, 3]),
        "attention_head_dim": draw([16, 16, 16, 32, 32, 24]),
        "num_layers": 1,
        "in_channels": draw([1, 2, 4]),
        "out_channels": draw([1, 2, 4]),
        "text_embed_dim": draw([1, 8]),
        "time_embed_dim": draw([1, 7, 8, 8]),
        "ofs_embed_dim": draw([None, None, None, 7, 8]),
        "patch_size": draw([1, 2, 3]),
        "patch_size_t": draw([None, 1, 2]),
        "max_text_seq_length": draw([1, 4]),
        "use_rotary_positional_embeddings": draw([True, True, False]),
        "use_learned_positional_embeddings": draw([True, False, False]),
        "sample_frames": draw([1, 4, 9]),
        "sample_height": draw([1, 2, 6, 6]),
        "sample_width": draw([1, 4, 6]),
        "spatial_interpolation_scale": draw([1.875] * 9 + [0]),
        "norm_eps": draw([1e-5] * 9 + [-1]),
    }
    try:
        config = TransformerConfig.from_dict(values)
    except ValueError as error:
        check_line(error)
        return
    frames, patch = 2 * (config.patch_size_t or 1), config.patch_size
    size = (config.sample_height, config.sample_width)
    if not config.use_learned_positional_embeddings:
        size = (2 * patch, 3 * patch)
    x, text = torch.randn(2, config.in_channels, frames, *size), torch.randn(2, config.max_text_seq_length, 8)
    with torch.no_grad():
        y = Transformer(config)(x, text[..., : config.text_embed_dim], torch.tensor([5, 999]))
    assert y.shape == (2, config.out_channels, frames, *size)
    assert y.isfinite().all()


@pytest.mark.parametrize("seed", range(60))
def test_any_vae_config_runs_or_is_refused_when_it_is_read(seed: int) -> None:
    draw = random.Random(seed).choice
    values = {
        "block_out_channels": [draw([2, 4, 6]) for _ in range(draw([1, 3, 4, 5]))],
        "layers_per_block": 1,
        "latent_channels": draw([1, 4]),
        "norm_num_groups": draw([1, 1, 2, 2, 4]),
        "temporal_compression_ratio": draw([1, 2, 4, 4, 3, 8, 16]),
        "scaling_factor": draw([1, 0.7, 0.7, 0]),
    }
    try:
        config = VAEConfig.from_dict(values)
    except ValueError as error:
        check_line(error)
        return
    period, stride = 2 * config.temporal_compression_ratio, config.spatial_compression_ratio
    vae = VAE(config)
    for frames in (period, 2 * period + 1):
        pixels = torch.randn(1, 3, frames, stride, 2 * stride)
        with torch.no_grad():
            latents = vae.encode(pixels).mean
            assert latents.shape == (1, config.latent_channels, config.latent_frames(frames), 1, 2)
            assert vae.decode(latents).shape == pixels.shape


def test_a_component_is_not_another(pristine: Path) -> None:
    with pytest.raises(ValueError, match=r"got class AutoencoderKLCogVideoX, want CogVideoXTransformer3DModel$"):
        load_transformer(pristine / "vae")
    with pytest.raises(ValueError, match=r"^model: got .*, want a directory with a vae/ or a config\.json in it$"):
        load_vae(pristine / "scheduler")


# What loading costs.

MEASURE = """
import json, os, sys, torch
from cogvid.weights.load import load_transformer
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
load_transformer(sys.argv[2])  # the imports and caches of a first call
written = []
def note(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(args[0]))
sys.addaudithook(note)
before = anonymous()
model = load_transformer(sys.argv[1], dtype="bfloat16")
loaded = anonymous() - before
for parameter in model.parameters():  # reads every page
    parameter.view(torch.int16).amax()
print(json.dumps({"loaded": loaded, "read": anonymous() - before, "written": written,
                  "parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.proj_out.weight.dtype)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_no_memory_that_cannot_be_dropped(pristine: Path, tmp_path: Path) -> None:
    """0.6 B parameters: five layers of the width of 5B, in bfloat16. Nor is any file written."""
    config = dataclasses.replace(CONFIGS["cogvideox-5b"].transformer, num_layers=5)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in unmap_state_dict(Transformer(config)).items()}
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**14), 2**14, (2**25,), generator=generator, dtype=torch.int16)
    state = {
        name: bits[: shape.numel()].clone().view(torch.bfloat16).view(shape) if shape.numel() <= 2**25
        else bits.repeat(2)[: shape.numel()].view(torch.bfloat16).view(shape)
        for name, shape in shapes.items()
    }  # fmt: skip
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    del state
    write_json(tmp_path / "config.json", {"_class_name": "CogVideoXTransformer3DModel", **config.to_dict()})

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(pristine)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["dtype"] == "torch.bfloat16"
    assert 0.6e9 < measured["parameters"] < 0.7e9
    smallest_matrix = config.hidden_size**2 * 2  # bytes: what copying one of them would take
    assert measured["loaded"] < 0.2 * smallest_matrix, measured
    assert measured["read"] < 0.2 * smallest_matrix, measured
    assert measured["written"] == []


def test_loaded_weights_can_be_written_without_touching_the_file(checkpoint: Path) -> None:
    digest_before = digest((checkpoint / "transformer" / WEIGHTS).read_bytes())
    model = load_transformer(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(not parameter.any() for parameter in model.parameters())
    assert digest((checkpoint / "transformer" / WEIGHTS).read_bytes()) == digest_before


def test_saving_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(OSError, match=WEIGHTS):
        save_vae(VAE(VAE_CONFIG), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_the_key_map_in_the_documentation_is_the_one_in_the_code() -> None:
    text = (Path(__file__).parents[2] / "weights.md").read_text()
    rows = [line for line in text.split("## Key map")[1].splitlines() if line.startswith("| `")]
    assert rows == [f"| `{a}` | `{b}` |" for a, b in (*TRANSFORMER_NAMES.items(), *VAE_NAMES.items())]

"""Noise files and trajectories: what is written, what it gives, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import cogvid
from cogvid.cli import main
from cogvid.run.noise import RecordedNoise, ReplayedNoise, load_noise, noise_hash
from cogvid.run.record import read_record
from cogvid.run.trajectory import Trajectory, load_trajectory
from tests.unit.test_record import generate, picture

MODELS = {"words": "tiny-t2v", "image": "tiny-i2v", "video": "tiny-t2v"}
DPM = ["step.0000.0", "step.0001.0", "step.0001.1", "step.0002.0"]  # of three steps


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("inputs")
    picture(64, 64).save(folder / "picture.png")
    cogvid.export_to_video([picture(64, 64, seed) for seed in range(9)], folder / "clip.mp4")
    options = {"words": [], "image": ["--image", folder / "picture.png"], "video": ["--video", folder / "clip.mp4"]}
    return {kind: ["--model", MODELS[kind], *map(str, given)] for kind, given in options.items()}


def without_seed(output: Path, *options: str) -> Path:
    command = ["generate", "the red circle moves right", "-o", str(output), "--num-frames", "9", "--device", "cpu"]
    assert main([*command, *options]) == 0
    return output


@pytest.mark.filterwarnings("ignore:num_inference_steps")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.every(3)
def test_noise_that_is_put_back_gives_the_same_latents(
    kind: str, dtype: str, inputs: dict[str, list[str]], tmp_path: Path
) -> None:
    options = [
        *inputs[kind],
        "--num-inference-steps",
        "3",
        "--dtype",
        dtype,
        *(["--strength", "1"] if kind == "video" else []),
    ]
    plain = generate(tmp_path / "plain.mp4", *options)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("noise", "again", "first", "second")}
    saved = generate(
        tmp_path / "saved.mp4", *options, "--save-noise", files["noise"], "--save-trajectory", files["first"]
    )
    assert saved.read_bytes() == plain.read_bytes()  # looking changes nothing
    noise = load_noise(files["noise"])
    assert list(noise) == ([] if kind == "words" else ["posterior"]) + ["initial", *DPM]
    assert {draw.dtype for draw in noise.values()} == {getattr(torch, dtype)}
    assert noise["initial"].shape == (1, 3, 16, 8, 8)
    if kind != "words":
        assert noise["posterior"].shape == (1, 3 if kind == "video" else 1, 16, 8, 8)
    assert len({tuple(draw.flatten()[:4].tolist()) for draw in noise.values()}) == len(noise)
    more = ["--noise", files["noise"], "--save-noise", files["again"], "--save-trajectory", files["second"]]
    put_back = without_seed(tmp_path / "back.mp4", *options, *map(str, more))
    first, second = load_trajectory(files["first"]), load_trajectory(files["second"])
    assert len(first.latents) == len(first.x0) == 3
    for a, b in zip(first.latents + first.x0, second.latents + second.x0, strict=True):
        assert torch.equal(a, b)
    assert files["again"].read_bytes() == files["noise"].read_bytes()
    record = read_record(put_back)
    assert (record["noise"], record["seed"], record["seeds"], record["given"]) == (noise_hash(noise), None, None, [])
    assert second.record == record
    again = ["replay", str(put_back), "-o", str(tmp_path / "replayed.mp4"), *inputs[kind][2:]]
    again = [option for option in again if option not in ("--image", inputs["image"][-1])]  # it is embedded
    assert main([*again, "--noise", str(files["noise"])]) == 0
    assert (tmp_path / "replayed.mp4").read_bytes() == put_back.read_bytes()


def test_noise_drawn_in_bf16_is_the_same_in_fp32(inputs: dict[str, list[str]], tmp_path: Path) -> None:
    """From a seed, fp32 draws numbers that bf16 rounds; from a file it takes the rounded ones."""
    file, again = tmp_path / "noise.safetensors", tmp_path / "again.safetensors"
    options = [*inputs["words"], "--num-inference-steps", "2"]
    generate(tmp_path / "a.mp4", *options, "--dtype", "bfloat16", "--save-noise", file)
    without_seed(tmp_path / "b.mp4", *options, "--dtype", "float32", "--noise", str(file), "--save-noise", str(again))
    generate(tmp_path / "c.mp4", *options, "--dtype", "float32", "--save-noise", tmp_path / "seed.safetensors")
    narrow, wide, seed = load_noise(file), load_noise(again), load_noise(tmp_path / "seed.safetensors")
    for name, draw in narrow.items():
        assert wide[name].dtype == torch.float32
        assert torch.equal(wide[name], draw.float())
        assert not torch.equal(wide[name], seed[name])


def test_draws_are_kept_and_put_back_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    with RecordedNoise(has_posterior=True) as recorded:
        drawn = [torch.randn(1, 16, 1, 2, 3, generator=generator), torch.randn((1, 5, 16, 2, 3), generator=generator)]
        drawn.append(torch.randn_like(drawn[1]))
        recorded.step = 11
        drawn += [torch.randn(size=(1, 5, 16, 2, 3)), torch.randn_like(drawn[1])]
    assert list(recorded.draws) == ["posterior", "initial", "step.0000.0", "step.0011.0", "step.0011.1"]
    assert recorded.draws["posterior"].shape == (1, 1, 16, 2, 3)
    with ReplayedNoise(recorded.draws):
        back = [torch.randn(1, 16, 1, 2, 3), *(torch.randn(1, 5, 16, 2, 3) for _ in range(4))]
    for a, b in zip(drawn, back, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"^noise: got posterior of shape \[1, 1, 16, "), ReplayedNoise(recorded.draws):
        torch.randn(1, 16, 2, 2, 3)
    with pytest.warns(UserWarning, match=r"^noise: 4 of 5 draws were not used$"), ReplayedNoise(recorded.draws):
        torch.randn(1, 16, 1, 2, 3)


def test_noise_that_does_not_fit_is_one_line(
    inputs: dict[str, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "noise.safetensors"
    generate(tmp_path / "a.mp4", *inputs["words"], "--scheduler", "ddim", "--save-noise", file)
    noise = load_noise(file)
    broken = {
        "other.safetensors": {"weight": torch.zeros(1, 3, 16, 8, 8)},
        "flat.safetensors": {"initial": torch.zeros(16)},
        "whole.safetensors": {"initial": torch.zeros(1, 3, 16, 8, 8, dtype=torch.int64)},
        "less.safetensors": {"step.0000.0": torch.zeros(1, 3, 16, 8, 8)},
        "small.safetensors": {"initial": noise["initial"][:, :2].contiguous()},
    }
    for name, tensors in broken.items():
        save_file(tensors, tmp_path / name)
    (tmp_path / "text.safetensors").write_text("These are words.")
    base = ["--model", "tiny-t2v", "--num-frames", "9", "--num-inference-steps", "2", "--device", "cpu"]
    for name, options, message in (
        ("noise", ["--scheduler", "dpm"], "noise: got a file of 1 draws, want one of a run that draws as often"),
        ("noise", ["--seed", "3"], "seed, noise: got both, want one of them"),
        ("noise", ["--height", "32"], "noise: got initial of shape [1, 3, 16, 8, 8], want [B, T, C, h, w] = [1, 3, 16"),
        ("missing", [], "which is no file"),
        ("text", [], "which is no safetensors file"),
        ("other", [], "with a tensor 'weight'"),
        ("flat", [], "noise: got initial [16] torch.float32, want [B, T, C, h, w] in a float dtype"),
        ("whole", [], "noise: got initial [1, 3, 16, 8, 8] torch.int64"),
        ("less", [], "without the tensor initial"),
        ("small", [], "noise: got initial of shape [1, 2, 16, 8, 8]"),
    ):
        capfd.readouterr()
        command = ["generate", "x", "-o", str(tmp_path / "no.mp4"), "--noise", str(tmp_path / f"{name}.safetensors")]
        assert main([*command, *base, *options]) == 2
        assert message in capfd.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "no.mp4").exists()


def test_a_trajectory_has_each_step(tmp_path: Path, inputs: dict[str, list[str]]) -> None:
    file = tmp_path / "trajectory.safetensors"
    made = generate(tmp_path / "a.mp4", *inputs["words"], "--scheduler", "ddim", "--save-trajectory", file)
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == {"latents", "x0", "timesteps"}
        assert opened.get_tensor("latents").shape == (2, 1, 3, 16, 8, 8)
        assert opened.get_tensor("timesteps").tolist() == [999, 499]
    trajectory = load_trajectory(file)
    assert trajectory.record == read_record(made)
    pipe = cogvid.load("tiny-t2v", device="cpu")
    out = pipe(
        "the red circle moves right", seed=3, num_frames=9, num_inference_steps=2, scheduler="ddim",
        output_type="latent", progress=False,
    )  # fmt: skip
    assert torch.equal(trajectory.latents[-1], out.frames)
    assert torch.allclose(trajectory.x0[-1], out.frames, atol=1e-6)  # the last step of DDIM ends at the prediction
    assert not torch.allclose(trajectory.x0[0], trajectory.latents[0], atol=0.1)


def test_what_is_no_trajectory_is_refused(tmp_path: Path) -> None:
    latents = torch.zeros(2, 1, 3, 16, 8, 8)
    steps = torch.tensor([999, 499])
    for tensors, metadata in (
        ({"latents": latents}, {"record": "{}"}),
        ({"latents": latents, "x0": latents[:1].clone(), "timesteps": steps}, {"record": "{}"}),
        ({"latents": latents[0].clone(), "x0": latents[0].clone(), "timesteps": steps}, {"record": "{}"}),
        ({"latents": latents, "x0": latents.clone(), "timesteps": steps}, {"record": "no"}),
        ({"latents": latents, "x0": latents.clone(), "timesteps": steps}, None),
    ):
        save_file(tensors, tmp_path / "bad.safetensors", metadata)
        with pytest.raises(ValueError, match=r"^trajectory: got '.*', which holds |with latents .*, want \[steps"):
            load_trajectory(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"^scheduler: got a sampler that does not call `step.x0`"):
        Trajectory().add(999, {"latents": latents})

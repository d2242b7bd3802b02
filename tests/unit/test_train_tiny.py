"""The training script: its optimizer, the targets of the auxiliary head, and a few steps of every stage."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cogvid
import train_tiny
from scripts.tiny_world import SHAPES, Scenes, render, sample_scenes

DEMO = Path(__file__).parents[2] / "scripts" / "demo.png"
SHORT = {
    "STEPS": {"vae": 3, "i2v": 2, "t2v": 3},
    "VAE_BATCH": {"images": 2, "crops": 1, "videos": 1},
    "LATENT_SETS": {
        "singles": (8, 2, 17, {"two": 0.0}),
        "pairs": (4, 5, 17, {"two": 1.0}),
        "images": (4, 6, 1, {"two": 0.0}),
    },
    "BATCH": 4,
    "IMAGE_BATCH": 4,
}


def arguments(out: Path) -> argparse.Namespace:
    return argparse.Namespace(out=out, minutes=None, device="cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the output directory of short runs of all stages; runs stay short while it is in use."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(train_tiny, name, value)
        for stage in train_tiny.STAGES.values():
            stage(arguments(directory))
        yield directory


def test_every_stage_runs_and_the_packs_make_videos(out: Path):
    for stage, steps in SHORT["STEPS"].items():
        saved = torch.load(out / f"{stage}.pt")
        assert saved["step"] == steps
        assert all(torch.isfinite(p).all() for p in saved["average"])
    for name, options in (("tiny-i2v", {"image": DEMO}), ("tiny-t2v", {})):
        pipe = cogvid.load(out / name, device="cpu")
        frames = pipe("the red circle moves up", num_inference_steps=2, output_type="uint8", progress=False, **options)
        assert frames.frames.shape == (1, 17, 64, 64, 3)
    weights = [out / name / "vae" / "diffusion_pytorch_model.safetensors" for name in ("tiny-i2v", "tiny-t2v")]
    assert weights[0].samefile(weights[1])


def copy_of(out: Path, directory: Path, *names: str) -> argparse.Namespace:
    for name in names:
        shutil.copy(out / name, directory)
    return arguments(directory)


def test_a_stage_goes_on_from_its_checkpoint(out: Path, tmp_path: Path):
    before = torch.load(out / "i2v.pt")
    args = copy_of(out, tmp_path, "singles.pt", "pairs.pt", "spiece.model", "i2v.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_tiny.STEPS, "i2v", 3)
        train_tiny.train_denoiser(args, "i2v")
    after = torch.load(tmp_path / "i2v.pt")
    assert after["step"] == 3
    assert after["seconds"] > before["seconds"]
    assert not torch.equal(after["model"]["aux_head.weight"], before["model"]["aux_head.weight"])


def test_the_same_seeds_train_the_same_weights(out: Path, tmp_path: Path):
    args = copy_of(out, tmp_path, "singles.pt", "images.pt", "spiece.model", "i2v.pt")
    train_tiny.train_denoiser(args, "t2v")
    first, second = (torch.load(d / "t2v.pt")["model"] for d in (out, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_text_to_video_goes_on_from_image_to_video(out: Path, tmp_path: Path):
    args = copy_of(out, tmp_path, "singles.pt", "images.pt", "spiece.model", "i2v.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_tiny.STEPS, "t2v", 1)  # a warm-up's first, so a small one
        train_tiny.train_denoiser(args, "t2v")
    slim = torch.load(tmp_path / "t2v.pt")["model"]
    wide = train_tiny.Denoiser(train_tiny.MODEL.transformer, slim["text_encoder.shared.weight"].shape[0])
    left = train_tiny.load_average("i2v", wide, args).state_dict()
    patches = "transformer.patch_proj.weight"
    left[patches] = left[patches][:, : slim[patches].shape[1]]
    for name, value in slim.items():
        torch.testing.assert_close(value, left[name], rtol=0, atol=1e-3)


def trainer_of(model: nn.Module, out: Path, steps: int, muon_lr: float) -> train_tiny.Trainer:
    args = arguments(out)
    return train_tiny.Trainer("test", model, args, steps=steps, muon_lr=muon_lr, adam_lr=0.01, adam_only=("last",))


def test_muon_orthogonalises_the_update_of_linears_and_convolutions(tmp_path: Path):
    """The singular values of an update are those of five Newton-Schulz steps: between 0.5 and 1.4, not all 1."""
    torch.manual_seed(0)
    layers = {
        "first": nn.Linear(24, 72),
        "middle": nn.Conv3d(3, 8, 3),
        "idle": nn.Linear(6, 7),
        "last": nn.Linear(5, 4),
    }
    model = nn.ModuleDict(layers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer, lr = trainer_of(model, tmp_path, steps=100, muon_lr=0.5), 0.5 * (1 / 50 + 1e-3)  # the warm-up's first step
    losses = [(p * torch.randn_like(p)).sum() * ("idle" not in name) for name, p in model.named_parameters()]
    trainer.backward(torch.stack(losses).sum())
    for name in ("first.weight", "middle.weight"):
        rows, columns = before[name].flatten(1).shape
        moved = (before[name] - model.get_parameter(name).detach()).flatten(1)
        values = torch.linalg.svdvals(moved) / (lr * max(1, rows / columns) ** 0.5)
        assert values.min() > 0.5, name
        assert values.max() < 1.4, name
    assert torch.equal(model.get_parameter("idle.weight"), before["idle.weight"])  # no weight decay
    for name in ("first.bias", "last.weight"):  # the first step of Adam has one size everywhere
        moved = (before[name] - model.get_parameter(name).detach()).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, lr * 0.01 / 0.5), rtol=1e-3, atol=0)


def test_a_trainer_solves_a_regression(tmp_path: Path):
    torch.manual_seed(0)
    model, x = nn.Linear(24, 72), torch.randn(256, 24)
    target = F.linear(x, torch.randn(72, 24), torch.randn(72) / 10)
    trainer, losses = trainer_of(model, tmp_path, steps=300, muon_lr=0.1), []
    for _ in trainer.run():
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        trainer.backward(loss)
    assert losses[-1] < 0.01 * losses[0]


def test_touched_cells_hold_the_shapes_pixels():
    scenes = sample_scenes(60, torch.Generator().manual_seed(3), two=0.5)
    touched = train_tiny.touched(scenes, 5, 8)
    for i in range(2):
        other = Scenes(**{name: value.clone() for name, value in vars(scenes).items()})
        other.rgb[:, i] = 1 - other.rgb[:, i]
        painted = (render(scenes, 5) - render(other, 5)).abs().amax(1) > 0.1
        in_cells = touched[:, :, i].repeat_interleave(8, -1).repeat_interleave(8, -2).bool()
        assert (painted & in_cells).sum() > 0.97 * painted.sum()
        assert in_cells.sum() < 4 * painted.sum()
    assert not touched[~scenes.two][:, :, 1].any()


def test_auxiliary_targets_mark_the_outlines_and_the_named_shape():
    scenes = sample_scenes(20, torch.Generator().manual_seed(4), two=1.0)
    targets = train_tiny.aux_targets(scenes, 5, 4)
    assert targets.shape == (20, 5 * 4 * 4, len(SHAPES) + 1)
    shown = F.one_hot(scenes.shape, len(SHAPES)).amax(1)
    assert torch.equal(targets[..., :3].amax(1), shown.float())
    named = targets.gather(2, scenes.shape[:, :1, None].expand(-1, 80, 1))[..., 0]
    assert (targets[..., 3] <= named).all()  # where the named shape is, its outline is


def test_times_are_spread_over_the_schedule():
    generator = torch.Generator().manual_seed(0)
    even = train_tiny.draw_times(1000, generator, middle=False)
    assert torch.equal(even.sort().values, torch.arange(1000))
    middle = train_tiny.draw_times(1000, generator, middle=True)
    assert ((middle > 269) & (middle < 731)).float().mean() == pytest.approx(0.683, abs=0.01)  # one deviation
    assert middle.min() >= 0
    assert middle.max() <= 999


def test_a_length_that_is_not_positive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        train_tiny.main(["--minutes", "0", "--out", str(tmp_path / "new")])
    assert "minutes: got 0, want more than 0" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

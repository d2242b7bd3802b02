"""A pipeline on several processes gives what one process gives, for each task and option."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cogvid
from cogvid.weights.parallel_option import Parallel
from measure import rel_rms
from references import picture
from tests import tolerances
from tests.checkpoints import write_variant
from tests.distributed.ranks import Ranks

OfRanks = Callable[[int], Ranks]
LORA = Path(__file__).parents[2] / "scripts" / "demo_lora.safetensors"
# A scale of 6, which the packs recommend, and steps that do not divide 1000 amplify rounding: with 6 of both, an ulp of
# the initial noise moves the latents of one process by 2e-5, and with these by 4e-7.
SMALL: dict[str, Any] = {"height": 48, "width": 32, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 2.0}
CLIP = torch.stack([torch.from_numpy(np.array(picture(48, 32, seed=i))) for i in range(9)])

# name -> what is loaded, how, and the call; the sizes are odd in tokens, rows and frames
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "words": ("tiny-t2v", {}, {}),
    "image": ("tiny-i2v", {}, {"image": picture(48, 32)}),
    "video": ("tiny-t2v", {}, {"video": CLIP, "strength": 0.7}),
    "both ends": ("tiny-i2v", {}, {"image": picture(48, 32), "last_image": picture(48, 32, seed=1)}),
    "control": ("control", {}, {"control_video": CLIP}),
    "inpainting": ("inpaint", {}, {"video": CLIP, "mask": picture(48, 32).convert("L")}),
    "no guidance": ("tiny-t2v", {}, {"guidance_scale": 1.0}),
    "batch": ("tiny-t2v", {}, {"num_videos_per_prompt": 3}),
    "one frame": ("tiny-t2v", {}, {"num_frames": 1}),
    "ddim": ("tiny-t2v", {}, {"scheduler": "ddim", "guidance_interval": "0-0.5"}),
    "first block": ("tiny-t2v", {}, {"step_cache": "first-block=0.25", "num_inference_steps": 8}),
    "teacache": ("tiny-t2v", {}, {"step_cache": "teacache=0.9:coefficients=1/0", "num_inference_steps": 5}),
    "pyramid": ("tiny-t2v", {}, {"step_cache": "pyramid=2", "num_inference_steps": 8}),
    "adapter": ("tiny-i2v", {"lora": f"{LORA}:0.8"}, {"image": picture(48, 32)}),
    "int8": ("tiny-t2v", {"quantize": "int8"}, {}),
    "parts": ("tiny-t2v", {"offload": "model"}, {}),
    "blocks": ("tiny-t2v", {"offload": "block"}, {}),
    "shards": ("tiny-t2v", {"shard_weights": True}, {}),
    "shards, 8 bits": ("tiny-t2v", {"shard_weights": True, "quantize": "fp8-storage"}, {}),
}
pytestmark = pytest.mark.filterwarnings("ignore")
DEFAULT = ("image", "batch", "pyramid", "shards")
SPLITS = [Parallel(ulysses=2), Parallel(ring=3), Parallel(cfg=2, ulysses=2), Parallel(cfg=2, ring=3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_variant(folder / "control", "tiny-t2v", "CogVideoXFunControlPipeline", 16)
    write_variant(folder / "inpaint", "tiny-t2v", "CogVideoXFunInpaintPipeline", 17)
    return folder


@functools.cache
def load(source: str, options: tuple[tuple[str, Any], ...]) -> cogvid.Pipeline:
    return cogvid.load(source, device="cpu", dtype="float32", **dict(options))


def run(case: str, folder: Path, split: Parallel | None = None) -> tuple[Any, ...]:
    """Run a case: latents, frames, and the record without what differs by the number of processes."""
    name, options, call = CASES[case]
    source = name if name.startswith("tiny") else str(folder / name)
    if split is None:
        options = {name: value for name, value in options.items() if name != "shard_weights"}
    pipe = load(source, tuple({**options, "parallel": split}.items()))
    given: dict[str, Any] = {"seed": 3, **SMALL, **call, "progress": False}
    latents = pipe("a red circle moves right", output_type="latent", **given)
    out = pipe("a red circle moves right", output_type="pt", **given)
    record = {k: v for k, v in out.provenance.items() if k not in ("parallel", "shard_weights", "machine")}
    return latents.frames, out.frames, record, out.skipped_steps


def check(case: str, folder: Path, ranks: Ranks, split: Parallel | None) -> None:
    latents, frames, record, skipped = run(case, folder)
    found = ranks.run(run, case, folder, split)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])
        assert other[2] == found[0][2]
    assert rel_rms(found[0][0], latents) <= tolerances.SPLIT_LATENTS
    assert rel_rms(found[0][1], frames) <= tolerances.PACK_FRAMES_FP32
    assert (found[0][1] - frames).abs().max() <= tolerances.PACK_FRAMES_MAX_ABS
    assert found[0][2:] == (record, skipped)


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in DEFAULT else pytest.mark.slow) for c in CASES])
def test_two_processes(case: str, folder: Path, ranks: OfRanks) -> None:
    """With the split that is taken if none is named: the two branches of guidance."""
    check(case, folder, ranks(2), None)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_more_processes(split: Parallel, case: str, folder: Path, ranks: OfRanks) -> None:
    check(case, folder, ranks(split.devices), split)


def test_the_processes_must_be_asked_for_the_same(ranks: OfRanks) -> None:
    for said in ranks(2).run(_ask_for_other_things):
        assert said == [
            "seed: got 1 on rank 1, want 0 as on rank 0",
            "num_frames: got 1 on rank 1, want none as on rank 0",
            "latents: got a Tensor on rank 1, want that of rank 0",
            "quantize: got 'int8' on rank 1, want None as on rank 0",
            "height: got 17, want a multiple of 16; the nearest is 16 or 32",
        ]


def _ask_for_other_things() -> list[str]:
    """In each of two processes, call with arguments that differ, or with a wrong one in both."""
    from cogvid.weights.parallel_option import rank

    pipe = load("tiny-t2v", ())
    said: list[str] = []
    calls: list[Callable[[], Any]] = [
        lambda: pipe("x", seed=rank()),
        lambda: pipe("x", **({"num_frames": 1} if rank() else {})),
        lambda: pipe("x", latents=torch.full((1,), float(rank()))),
        lambda: cogvid.load("tiny-t2v", quantize="int8" if rank() else None),
        lambda: pipe("x", height=17),
    ]
    for call in calls:
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_seed_and_text_are_those_of_the_first(ranks: OfRanks) -> None:
    found = ranks(2).run(_draw_and_encode)
    assert found[0]["seed"] == found[1]["seed"]
    assert [each["parameters"] > 0 for each in found] == [True, False]
    assert torch.equal(found[0]["text"], found[1]["text"])
    assert found[0]["refused"] == found[1]["refused"]
    assert "vocab_size" in found[0]["refused"]


def _draw_and_encode() -> dict[str, Any]:
    pipe = load("tiny-t2v", ())
    out = pipe("x", num_frames=1, height=16, width=16, num_inference_steps=1, progress=False, output_type="latent")
    encoder = pipe.text_encoder
    text = encoder(["a red circle"], 4)
    size, encoder.t5.config = getattr(encoder.t5, "config", None), type("Config", (), {"vocab_size": 1})
    try:
        encoder(["a red circle"], 4)
        refused = ""
    except ValueError as error:
        refused = str(error)
    encoder.t5.config = size
    return {
        "seed": out.seed,
        "parameters": sum(p.numel() for p in encoder.t5.parameters()),
        "text": text,
        "refused": refused,
    }

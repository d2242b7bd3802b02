"""Whole tiny pipelines on the Triton kernels give what the plain operations give."""

import dataclasses
from pathlib import Path

import pytest
import torch

import cogvid
from cogvid.ops import attention
from measure import rel_rms
from references import picture, save_pipeline, tiny_pipeline
from tests import tolerances

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 2


# Without rotation; with it; with frames in pairs and an image. The widths are not those of each other.
@pytest.mark.parametrize(
    "variant", [pytest.param("2b", marks=pytest.mark.slow), "5b", pytest.param("1.5-5b-i2v", marks=pytest.mark.slow)]
)
def test_triton_equals_torch(variant: str, tmp_path: Path, device: torch.device) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    directory = save_pipeline(*tiny_pipeline(variant), tmp_path / "model")
    image = {"image": picture(40, 60)} if variant.endswith("i2v") else {}
    latents, frames = {}, {}
    for ops in ("torch", "triton"):
        pipe = cogvid.load(directory, device=device, dtype="float32", ops=ops)
        options = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": STEPS, "seed": 3, **image}
        out = pipe("a red circle", output_type="latent", **options)
        assert out.provenance["ops"] == ops
        latents[ops] = out.frames
        frames[ops] = torch.as_tensor(pipe("a red circle", output_type="np", **options).frames)
    assert rel_rms(latents["triton"], latents["torch"]) <= tolerances.PIPELINE_LATENTS
    assert rel_rms(frames["triton"], frames["torch"]) <= tolerances.PIPELINE_TRITON_FRAMES
    assert frames["torch"].std() > 0.05


def test_the_bundle_of_kernels_is_known_by_its_name(device: torch.device) -> None:
    pipe = cogvid.load("tiny-t2v", device=device, ops=cogvid.Ops.triton())
    assert pipe.ops == "triton"
    pipe.set_ops("torch")
    pipe.set_ops(cogvid.Ops.triton())
    assert pipe.ops == "triton"
    pipe.set_ops(dataclasses.replace(cogvid.Ops.triton(), attention=attention))
    assert pipe.ops == "custom"


PACK = Path(cogvid.__file__).parent / "packs" / "tiny-i2v"


@pytest.mark.slow
@pytest.mark.skipif(not PACK.is_dir(), reason="the pack is not in this checkout")
def test_the_shipped_pack(device: torch.device) -> None:
    latents = {
        ops: cogvid.load("tiny-i2v", device=device, dtype="float32", ops=ops)(
            "the red circle moves right", image=picture(64, 64), num_inference_steps=STEPS, seed=1, output_type="latent"
        ).frames
        for ops in ("torch", "triton")
    }
    assert rel_rms(latents["triton"], latents["torch"]) <= tolerances.PIPELINE_LATENTS

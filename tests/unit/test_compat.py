"""`cogvid.compat` without diffusers: scripts of the family on the shipped packs, and what has no meaning here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cogvid
from cogvid import compat

SCRIPTS = Path(__file__).parents[2] / "scripts"
PROMPT = "the red circle moves right"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 17 frames of 64x64 pixels, noise that moves."""
    noise = torch.rand(1, 64, 80, 3, generator=generator())
    frames = torch.cat([noise[:, :, i : i + 64] for i in range(16)] + [noise[:, :, :64]])
    return Path(cogvid.export_to_video(frames, tmp_path_factory.mktemp("clip") / "clip.mp4", fps=8))


def run_script(task: str, clip: Path, out: Path, modes: bool) -> Any:
    """Do what the script of the authors does for a task, in its order."""
    image, video = None, None
    if task == "i2v":
        pipe: Any = compat.CogVideoXImageToVideoPipeline.from_pretrained("tiny-i2v", torch_dtype=torch.bfloat16)
        image = compat.load_image(image=str(SCRIPTS / "demo.png"))
    elif task == "t2v":
        pipe = compat.CogVideoXPipeline.from_pretrained("tiny-t2v", torch_dtype=torch.bfloat16)
    else:
        pipe = compat.CogVideoXVideoToVideoPipeline.from_pretrained("tiny-t2v", torch_dtype=torch.bfloat16)
        video = compat.load_video(str(clip))
    if task == "i2v":
        pipe.load_lora_weights(str(SCRIPTS), weight_name="demo_lora.safetensors", adapter_name="test_1")
        pipe.fuse_lora(components=["transformer"], lora_scale=1.0)
    pipe.scheduler = compat.CogVideoXDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    if modes:
        pipe.enable_sequential_cpu_offload()
        pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    given = {"i2v": {"image": image}, "v2v": {"video": video}, "t2v": {}}[task]
    frames = pipe(
        height=64,
        width=64,
        prompt=PROMPT,
        **given,
        num_videos_per_prompt=1,
        num_inference_steps=2,
        num_frames=9,
        use_dynamic_cfg=True,
        guidance_scale=6.0,
        generator=generator(),
    ).frames[0]
    assert compat.export_to_video(frames, str(out), fps=8) == str(out)
    return frames


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
def test_the_script_of_the_authors(task: str, modes: bool, clip: Path, tmp_path: Path) -> None:
    """The modes change no pixel: nothing here is larger than a tile."""
    frames = run_script(task, clip, tmp_path / "out.mp4", modes)
    written, fps = cogvid.read_video(tmp_path / "out.mp4")
    assert (written.shape, fps) == ((9, 64, 64, 3), 8)
    if modes:
        plain = run_script(task, clip, tmp_path / "plain.mp4", False)
        assert np.abs(np.stack(frames).astype(int) - np.stack(plain)).max() <= 1


def test_each_way_to_offload_is_a_mode() -> None:
    for call, mode in (
        ("enable_model_cpu_offload", "model"),
        ("enable_sequential_cpu_offload", "block"),
    ):
        pipe = compat.CogVideoXPipeline.from_pretrained("tiny-t2v")
        getattr(pipe, call)()
        assert pipe.core.placement.offload == mode
    pipe = compat.CogVideoXPipeline.from_pretrained("tiny-t2v")
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=True)
    assert pipe.core.placement.offload == "block"


def test_num_videos_per_prompt_has_its_effect() -> None:
    """diffusers takes one for any number."""
    pipe = compat.CogVideoXPipeline.from_pretrained("tiny-t2v")
    made = pipe(PROMPT, num_frames=9, num_inference_steps=1, num_videos_per_prompt=2, generator=generator())
    assert len(made.frames) == 2


def test_modes_that_come_late_load_again_with_the_adapters() -> None:
    pipe = compat.CogVideoXImageToVideoPipeline.from_pretrained("tiny-i2v")
    pipe.load_lora_weights(SCRIPTS / "demo_lora.safetensors", adapter_name="left")
    before = pipe._weights.get()
    pipe.to(torch.float32)
    assert pipe._weights.get() is before
    pipe.to(torch.bfloat16)
    after = pipe._weights.get()
    assert after is not before
    assert [lora.name for lora in after.placement.lora] == pipe.get_active_adapters() == ["left"]
    assert after.dtype == torch.bfloat16
    pipe.fuse_lora(lora_scale=0.5)
    pipe.to(torch.float32)
    [lora] = pipe._weights.get().placement.lora
    assert (lora.fused, lora.scale) == (True, 0.5)
    pipe.unload_lora_weights()
    pipe.to(torch.bfloat16)
    assert pipe._weights.get().placement.lora == ()


# One line for what has no meaning here


def pipeline() -> Any:
    return compat.CogVideoXPipeline.from_pretrained("tiny-t2v")


def called(**options: Any) -> Any:
    return pipeline()(PROMPT, num_inference_steps=1, num_frames=9, **options)


NOTHING: dict[str, tuple[Any, str]] = {
    "eta": (lambda: called(eta=0.5), "eta: got 0.5, want 0"),
    "timesteps": (lambda: called(timesteps=[999]), "timesteps: got some, want None"),
    "attention_kwargs": (lambda: called(attention_kwargs={"mask": 1}), "attention_kwargs: got 'mask', want only"),
    "xformers": (
        lambda: pipeline().enable_xformers_memory_efficient_attention(),
        "enable_xformers_memory_efficient_attention: got a name without a meaning here, want nothing",
    ),
    "attention slices": (lambda: pipeline().enable_attention_slicing(), "enable_attention_slicing: got"),
    "casting": (lambda: pipeline().transformer.enable_layerwise_casting(), r"quantize='fp8-storage'"),
    "unknown": (lambda: pipeline().enable_magic(), "enable_magic: got .* want `core`, the pipeline of cogvid.load"),
    "save": (lambda: pipeline().save_pretrained("x"), "save_pretrained: got .* want cogvid.weights.load.save"),
    "scheduler": (lambda: setattr(pipeline(), "scheduler", 3), "scheduler: got int, want a CogVideoXDPMScheduler or"),
    "setting": (lambda: compat.CogVideoXDPMScheduler(solver_order=2), "scheduler: got 'solver_order', want one of"),
    "compile": (
        lambda: setattr(pipeline(), "transformer", torch.nn.Linear(1, 1)),
        r"transformer: got Linear, want it as from_pretrained\(.*compile=True",
    ),
    "component": (
        lambda: compat.CogVideoXPipeline.from_pretrained("tiny-t2v", vae=3),
        "vae: got int, want one of cogvid.compat, or nothing",
    ),
    "option": (
        lambda: compat.CogVideoXPipeline.from_pretrained("tiny-t2v", cache_dir="x"),
        "cache_dir: got .* want the environment of huggingface_hub",
    ),
    "lora": (
        lambda: compat.CogVideoXPipeline.from_pretrained("tiny-t2v", lora="x"),
        r"lora: got an option without a meaning here, want load_lora_weights\(\)",
    ),
    "no option": (
        lambda: compat.CogVideoXPipeline.from_pretrained("tiny-t2v", magic=1),
        "magic: got an option without a meaning here, want one of torch_dtype, device",
    ),
    "device_map": (
        lambda: compat.CogVideoXPipeline.from_pretrained("tiny-t2v", device_map="balanced"),
        "device_map: got 'balanced', want a device",
    ),
    "dtypes": (
        lambda: compat.CogVideoXPipeline.from_pretrained("tiny-t2v", torch_dtype={"vae": torch.float32}),
        "torch_dtype: got one for each part, want one for all",
    ),
    "pickles": (
        lambda: compat.CogVideoXPipeline.from_pretrained("tiny-t2v", use_safetensors=False),
        "use_safetensors: got False, want True",
    ),
    "tiles": (
        lambda: pipeline().vae.enable_tiling(tile_sample_min_height=96),
        "tile_sample_min_height: got 96, want None",
    ),
    "task": (
        lambda: compat.CogVideoXImageToVideoPipeline.from_pretrained("tiny-t2v"),
        "model: got tiny-t2v, which takes no image and cannot do image-to-video, want one of",
    ),
    "state dict": (lambda: pipeline().load_lora_weights({}), "lora: got dict, want a file, a directory or a hub id"),
    "device": (lambda: pipeline().to("tpu"), "device: got 'tpu', want 'cpu', 'cuda'"),
    "bitrate": (lambda: compat.export_to_video(frames(), bitrate=1), "bitrate: got 1, want a quality"),
    "quality": (lambda: compat.export_to_video(frames(), quality=11), "quality: got 11, want 0 to 10"),
    "block": (
        lambda: compat.export_to_video(frames(), macro_block_size=64),
        "macro_block_size: got 64 for 32x48 pixels, want None or a divisor",
    ),
    "convert": (
        lambda: compat.load_image(str(SCRIPTS / "demo.png"), lambda image: image),
        "convert_method: got .* want a call of it",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_what_has_no_meaning_here_says_so_in_one_line(case: str) -> None:
    call, message = NOTHING[case]
    with pytest.raises((ValueError, AttributeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_unknown_arguments_of_a_call_are_type_errors() -> None:
    for call in (lambda: called(magic=1), lambda: compat.CogVideoXImageToVideoPipeline.from_pretrained("tiny-i2v")()):
        with pytest.raises(TypeError):
            call()


# Pictures and videos


def frames(count: int = 3) -> list[Image.Image]:
    noise = torch.rand(count, 32, 48, 3, generator=generator())
    return [Image.fromarray(each) for each in (noise * 255).to(torch.uint8).numpy()]


def test_quality_is_the_crf_of_imageio(tmp_path: Path) -> None:
    for quality, crf in ((5.0, 25), (10, 0), (0, 51), (7.5, 12), (None, 18)):
        path = compat.export_to_video(frames(), output_video_path=str(tmp_path / "a.mp4"), fps=10, quality=quality)
        expected = cogvid.export_to_video(frames(), tmp_path / "b.mp4", fps=10, crf=crf)
        assert Path(path).read_bytes() == Path(expected).read_bytes()


def test_a_video_without_a_path_and_frames_of_each_kind(tmp_path: Path) -> None:
    path = Path(compat.export_to_video(frames()))
    made = {path.read_bytes()}
    path.unlink()
    array = np.stack([np.asarray(frame) for frame in frames()]).astype(np.float32) / 255
    for given in (list(array), array, torch.from_numpy(array).permute(0, 3, 1, 2)):
        made.add(Path(compat.export_to_video(given, str(tmp_path / "x.mp4"))).read_bytes())
    assert len(made) == 1
    listed = compat.load_video(str(tmp_path / "x.mp4"))
    assert [each.size for each in listed] == [(48, 32)] * 3
    halves, fps = compat.load_video(str(tmp_path / "x.mp4"), convert_method=lambda v: v[::2], return_fps=True)
    assert (len(halves), fps) == (2, 10)


def test_pictures_are_those_of_cogvid() -> None:
    path = str(SCRIPTS / "demo.png")
    assert compat.load_image(image=path).tobytes() == cogvid.load_image(path).tobytes()
    assert compat.load_image(Image.open(path)).mode == "RGB"


def test_compat_needs_no_diffusers(tmp_path: Path) -> None:
    code = (
        "import sys; import cogvid.compat; assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_links_to_parts_are_removed(tmp_path: Path) -> None:
    """Parts of several checkpoints are joined by links in a directory that goes with the pipeline."""
    shutil.copytree(Path(cogvid.__file__).parent / "packs" / "tiny-t2v" / "vae", tmp_path / "vae")
    vae = compat.AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae")
    pipe = compat.CogVideoXPipeline.from_pretrained("tiny-t2v", vae=vae)
    joined = pipe._weights.source.directory  # pyright: ignore[reportFunctionMemberAccess]
    assert (joined / "vae").resolve() == (tmp_path / "vae").resolve()
    del pipe
    assert not joined.exists()

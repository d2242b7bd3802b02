"""`cogvid.compat` against diffusers' classes: the same calls, the same videos, and errors where diffusers has them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import cogvid
from cogvid import compat
from cogvid.weights.hub import find
from measure import rel_rms
from references import TEXT_LEN, as_video_to_video, picture, save_pipeline, tiny_encoder, tiny_pipeline, tiny_vae
from tests.frames import assert_frames_equal
from tests.parity.test_lora import save_diffusers
from tests.schedulers import SCHEDULERS
from tests.tolerances import COMPAT_LATENTS, VAE_FP32

SIZE = {"height": 64, "width": 96}
PROMPT, OTHER = "a red", "two dogs"
TASKS = {"t2v": "5b", "i2v": "5b-i2v", "v2v": "5b", "t2v-1.5": "1.5-5b", "i2v-1.5": "1.5-5b-i2v"}
CLASSES = {
    "t2v": compat.CogVideoXPipeline,
    "i2v": compat.CogVideoXImageToVideoPipeline,
    "v2v": compat.CogVideoXVideoToVideoPipeline,
}
CLIP = [picture(40, 50, seed=i) for i in range(9)]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Pair:
    """The same tiny model as diffusers' pipeline and as compat's, for one task."""

    task: str
    reference: Any
    ours: Any
    directory: Path

    def inputs(self, **changes: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"prompt": PROMPT, **SIZE, "num_inference_steps": 3, "max_sequence_length": TEXT_LEN}
        given |= {"output_type": "latent"}
        given |= {"video": CLIP} if self.task == "v2v" else {"num_frames": 9}
        given |= {"image": picture(50, 70)} if self.task.startswith("i2v") else {}
        return {**given, **changes}

    def run(self, **changes: Any) -> tuple[Any, Any]:
        """The frames of both for the same call; ours first."""
        if "generator" not in changes:
            changes["generator"] = generator
        results = []
        for pipe in (self.ours, self.reference):
            made = {n: v() if n == "generator" and callable(v) else v for n, v in self.inputs(**changes).items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(pipe(**made)[0])
        return results[0], results[1]

    def same(self, **changes: Any) -> Tensor:
        """Both make the same latents, which are returned."""
        ours, reference = self.run(**changes)
        assert ours.dtype == reference.dtype == torch.float32
        assert rel_rms(ours, reference) < COMPAT_LATENTS
        return ours


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(task: str) -> Pair:
        if task not in made:
            reference, spiece = tiny_pipeline(TASKS[task])
            directory = save_pipeline(reference, spiece, tmp_path_factory.mktemp("model"))
            reference = as_video_to_video(reference) if task == "v2v" else reference
            ours = CLASSES[task.partition("-")[0]].from_pretrained(directory, torch_dtype=torch.float32)
            ours.set_progress_bar_config(disable=True)
            made[task] = Pair(task, reference, ours, directory)
        both = made[task]  # with the scheduler that the checkpoint has, whatever another test set
        both.reference.scheduler = SCHEDULERS["ddim"].from_pretrained(both.directory, subfolder="scheduler")
        both.ours.scheduler = compat.CogVideoXDDIMScheduler.from_pretrained(both.directory)
        return both

    return get


@pytest.mark.parametrize("name", [name for name in compat.__all__ if name.endswith("Pipeline")])
def test_calls_have_the_names_and_defaults_of_diffusers(name: str) -> None:
    theirs = inspect.signature(getattr(diffusers, name).__call__).parameters
    ours = inspect.signature(getattr(compat, name).__call__).parameters
    added = {"num_frames"} if "VideoToVideo" in name else set()  # the authors' script gives it
    left_out = {"control_video_latents"}
    assert [n for n in theirs if n not in left_out] == [n for n in ours if n not in added]
    for argument in set(theirs) & set(ours):
        default = theirs[argument].default
        default = tuple(default) if isinstance(default, list) else default
        assert ours[argument].default == default, argument
        assert ours[argument].kind == theirs[argument].kind


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("task", TASKS)
def test_the_same_call_makes_the_same_video(
    pair: Callable[[str], Pair], task: str, scheduler: str, dynamic: bool
) -> None:
    """The scheduler is set as the authors' script sets it."""
    both = pair(task)
    both.reference.scheduler = SCHEDULERS[scheduler].from_config(
        both.reference.scheduler.config, timestep_spacing="trailing"
    )
    made = {"dpm": compat.CogVideoXDPMScheduler, "ddim": compat.CogVideoXDDIMScheduler}[scheduler]
    both.ours.scheduler = made.from_config(both.ours.scheduler.config, timestep_spacing="trailing")
    both.same(use_dynamic_cfg=dynamic)
    assert both.ours.guidance_scale == both.reference.guidance_scale
    assert both.ours.num_timesteps == both.reference.num_timesteps
    assert both.ours.current_timestep is both.reference.current_timestep is None


def test_settings_of_the_scheduler_arrive(pair: Callable[[str], Pair]) -> None:
    both = pair("t2v")
    usual = both.same()
    changes = {"timestep_spacing": "linspace", "snr_shift_scale": 2.0}
    both.reference.scheduler = SCHEDULERS["dpm"].from_config(both.reference.scheduler.config, **changes)
    both.ours.scheduler = compat.CogVideoXDPMScheduler.from_config(both.ours.scheduler.config, **changes)
    assert rel_rms(both.same(), usual) > 0.1
    read = compat.CogVideoXDPMScheduler.from_pretrained(both.directory, subfolder="scheduler")
    theirs: Any = diffusers.CogVideoXDPMScheduler.from_pretrained(both.directory, subfolder="scheduler")
    theirs = theirs.config
    assert {name: read.config[name] for name in read.config} == {name: theirs.get(name) for name in read.config} | {
        "_class_name": "CogVideoXDPMScheduler"
    }
    plain, bare = compat.CogVideoXDDIMScheduler().config, diffusers.CogVideoXDDIMScheduler().config
    assert all(plain[name] == bare[name] for name in plain if name != "_class_name")


ARGUMENTS: dict[str, dict[str, Any]] = {
    "negative": {"negative_prompt": OTHER},
    "negatives": {"prompt": [PROMPT, OTHER], "negative_prompt": [OTHER, PROMPT]},
    "a negative for all": {"prompt": [PROMPT, OTHER], "negative_prompt": OTHER},
    "generators": {"prompt": [PROMPT, OTHER], "generator": lambda: [generator(1), generator(2)]},
    "unguided": {"guidance_scale": 1.0},
    "text": {"max_sequence_length": 6},
    "steps": {"num_inference_steps": 2},
    "size": {"height": 48, "width": 64},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(pair: Callable[[str], Pair], case: str) -> None:
    both = pair("t2v")
    plain, made = both.same(negative_prompt=None), both.same(**ARGUMENTS[case])
    assert made.shape != plain.shape or rel_rms(made, plain) > 0.01


def test_image_by_position_and_a_list_with_one_for_each_prompt(pair: Callable[[str], Pair]) -> None:
    both = pair("i2v")
    given = both.inputs()
    image = given.pop("image")
    ours = both.ours(image, **given, generator=generator())[0]
    assert torch.equal(ours, both.same())
    pictures = [picture(50, 70), picture(64, 96, seed=4)]
    both.same(image=pictures, prompt=[PROMPT, OTHER], generator=lambda: [generator(1), generator(2)])


def test_pixels_as_tensors(pair: Callable[[str], Pair]) -> None:
    both = pair("i2v")
    exact = np.asarray(picture(64, 96), dtype=np.float32) / 255
    both.same(image=torch.from_numpy(exact).permute(2, 0, 1)[None])
    with pytest.raises(ValueError, match=r"image: got pixels that are no multiples of 1/255"):
        both.ours(**both.inputs(image=torch.full((1, 3, 64, 96), 0.1234)))
    with pytest.raises(ValueError, match=r"image: got pixels of \[32, 96, 3\]"):
        both.ours(**both.inputs(image=torch.zeros(1, 3, 32, 96)))
    clip = np.stack([np.asarray(picture(64, 96, seed=i), dtype=np.float32) / 255 for i in range(9)])
    videos = pair("v2v")
    as_tensor = videos.same(video=torch.from_numpy(clip).permute(0, 3, 1, 2)[None])
    assert torch.equal(as_tensor, videos.same(video=[picture(64, 96, seed=i) for i in range(9)]))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.every(3)
def test_return_types(pair: Callable[[str], Pair], output_type: str, return_dict: bool) -> None:
    both = pair("t2v")
    given = both.inputs(output_type=output_type, return_dict=return_dict, num_inference_steps=1)
    ours, reference = (pipe(**given, generator=generator()) for pipe in (both.ours, both.reference))
    assert isinstance(ours, tuple) == isinstance(reference, tuple) == (not return_dict)
    assert len(ours.to_tuple() if return_dict else ours) == 1
    if return_dict:
        assert ours[0] is ours.frames is ours["frames"] is ours.to_tuple()[0]
    a, b = ours[0], reference[0]
    assert type(a) is type(b)
    if output_type == "pil":
        assert [frame.size for frame in a[0]] == [frame.size for frame in b[0]]
        assert np.abs(np.stack(a[0]).astype(int) - np.stack(b[0])).max() <= 1
    else:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if output_type != "latent":
            assert_frames_equal(np.asarray(a), np.asarray(b))


def test_without_a_generator_the_global_one_is_used(pair: Callable[[str], Pair]) -> None:
    both = pair("t2v")
    results = []
    for pipe in (both.ours, both.reference, both.ours):
        torch.manual_seed(5)
        results.append(pipe(**both.inputs())[0])
    assert rel_rms(results[0], results[1]) < COMPAT_LATENTS
    assert torch.equal(results[0], results[2])


def test_embeddings_are_made_alone_and_given(pair: Callable[[str], Pair]) -> None:
    both = pair("t2v")
    ours = both.ours.encode_prompt(PROMPT, None, max_sequence_length=TEXT_LEN)
    theirs = both.reference.encode_prompt(PROMPT, None, max_sequence_length=TEXT_LEN)
    for a, b in zip(ours, theirs, strict=True):
        assert rel_rms(a, b) < COMPAT_LATENTS
    given = {"prompt": None, "prompt_embeds": ours[0], "negative_prompt_embeds": ours[1]}
    assert rel_rms(both.same(**given), both.same()) < COMPAT_LATENTS
    assert both.ours.encode_prompt(PROMPT, None, do_classifier_free_guidance=False)[1] is None


def test_latents_are_decoded(pair: Callable[[str], Pair]) -> None:
    both = pair("t2v")
    latents = both.same()
    assert rel_rms(both.ours.decode_latents(latents), both.reference.decode_latents(latents)) < VAE_FP32


def test_latents_of_a_video_are_given_instead_of_it(pair: Callable[[str], Pair]) -> None:
    both = pair("v2v")
    latents = torch.randn(1, 3, 16, 8, 12, generator=generator())
    assert rel_rms(both.same(video=None, latents=latents), both.same()) > 0.1


def test_as_many_frames_of_a_video_as_are_asked_for(pair: Callable[[str], Pair]) -> None:
    """diffusers has no such argument, but the authors' script gives it."""
    both = pair("v2v")
    longer = both.ours(**both.inputs(video=[*CLIP, *CLIP], num_frames=9, generator=generator()))[0]
    assert torch.equal(longer, both.ours(**both.inputs(generator=generator()))[0])


# Callbacks


def test_a_callback_gets_the_tensors_that_it_names(pair: Callable[[str], Pair]) -> None:
    both = pair("i2v")
    names = both.reference._callback_tensor_inputs
    assert both.ours._callback_tensor_inputs == names
    for wanted in (["latents"], names, []):
        seen: list[dict[str, Any]] = []

        def look(pipe: Any, index: int, t: Tensor, given: dict[str, Any], seen: list[Any] = seen) -> dict[str, Any]:
            seen.append({"index": index, "t": int(t), "guidance": pipe.guidance_scale, **given})
            assert int(pipe.current_timestep) == int(t)
            return given

        both.same(callback_on_step_end=look, callback_on_step_end_tensor_inputs=wanted)
        ours, theirs = seen[:3], seen[3:]
        for a, b in zip(ours, theirs, strict=True):
            assert list(a) == list(b) == ["index", "t", "guidance", *wanted]
            assert [a[n] for n in ("index", "t", "guidance")] == [b[n] for n in ("index", "t", "guidance")]
            for name in wanted:
                assert a[name].shape == b[name].shape
                assert rel_rms(a[name], b[name]) < COMPAT_LATENTS


def raise_guidance(pipe: Any, index: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    pipe._guidance_scale += 1.0
    return given


def halve_latents(pipe: Any, index: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return {"latents": given["latents"] / 2}


def halve_latents_in_place(pipe: Any, index: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    given["latents"] *= 0.5
    return {}


def change_embeddings(pipe: Any, index: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return {"prompt_embeds": given["prompt_embeds"] / 2}


def change_embeddings_in_place(pipe: Any, index: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    given["prompt_embeds"] += 1
    return given


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    "change",
    [raise_guidance, halve_latents, halve_latents_in_place, change_embeddings, change_embeddings_in_place],
)
def test_what_a_callback_changes_changes_the_steps_after(
    pair: Callable[[str], Pair], change: Callable[..., Any], scheduler: str
) -> None:
    both = pair("t2v")
    both.reference.scheduler = SCHEDULERS[scheduler].from_config(both.reference.scheduler.config)
    made = {"dpm": compat.CogVideoXDPMScheduler, "ddim": compat.CogVideoXDDIMScheduler}[scheduler]
    both.ours.scheduler = made.from_config(both.ours.scheduler.config)
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    changed, plain = both.same(**options), both.same()
    assert rel_rms(changed, plain) > 0.01
    assert both.ours.guidance_scale == both.reference.guidance_scale == 6
    both.same(guidance_scale=2.0, **options)
    assert both.ours.guidance_scale == both.reference.guidance_scale == (5 if change is raise_guidance else 2)


def test_dynamic_guidance_and_no_guidance_do_not_heed_a_callback(pair: Callable[[str], Pair]) -> None:
    both = pair("t2v")
    for options in ({"use_dynamic_cfg": True}, {"guidance_scale": 1.0}):
        assert torch.equal(both.same(**options, callback_on_step_end=raise_guidance), both.same(**options))


def test_the_last_latents_are_those_of_the_callback(pair: Callable[[str], Pair]) -> None:
    both = pair("v2v")

    def zeros(pipe: Any, index: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
        return {"latents": torch.zeros_like(given["latents"])} if index == pipe.num_timesteps - 1 else given

    ours, theirs = both.run(callback_on_step_end=zeros)
    assert ours.abs().sum() == theirs.abs().sum() == 0


def test_a_callback_that_changes_nothing_costs_no_precision(pair: Callable[[str], Pair]) -> None:
    """diffusers' latents are bf16 between two steps; here they stay float32."""
    half = compat.CogVideoXPipeline.from_pretrained(pair("t2v").directory, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    given = pair("t2v").inputs()
    plain = half(**given, generator=generator()).frames
    seen = half(**given, generator=generator(), callback_on_step_end=lambda *a: a[3]).frames
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain, seen)
    with torch.inference_mode():
        assert half(**given, generator=generator(), callback_on_step_end=lambda *a: a[3]).frames.isfinite().all()


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("task", ["t2v", "i2v-1.5"])
@pytest.mark.every(2)
def test_interrupt_ends_the_steps_and_decodes(pair: Callable[[str], Pair], task: str, at: int) -> None:
    both, steps = pair(task), []

    def stop(pipe: Any, index: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
        steps.append(index)
        pipe._interrupt = index == at
        return given

    ours, theirs = both.run(callback_on_step_end=stop, output_type="np")
    assert steps == [*range(at + 1)] * 2
    assert_frames_equal(ours, theirs)
    assert both.ours.interrupt is both.reference.interrupt is True
    both.same()  # and the next call runs whole


def test_hooks_are_gone_after_a_call_that_fails(pair: Callable[[str], Pair]) -> None:
    both = pair("t2v")
    before = both.same()

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        both.ours(**both.inputs(callback_on_step_end=fail, generator=generator()))
    assert torch.equal(before, both.same())
    transformer = both.ours._weights.get().transformer
    assert not transformer._forward_hooks
    assert not transformer._forward_pre_hooks


# Adapters


def test_adapters(tmp_path: Path) -> None:
    """Each step of a script with two adapters, in diffusers and here."""
    reference, spiece = tiny_pipeline("5b")
    ours = compat.CogVideoXPipeline.from_pretrained(save_pipeline(reference, spiece, tmp_path / "model"))
    ours.set_progress_bar_config(disable=True)
    both = Pair("t2v", reference, ours, tmp_path)
    for seed, name in enumerate("ab"):
        save_diffusers(reference.transformer, tmp_path / name, seed=seed)
    file = {"weight_name": "pytorch_lora_weights.safetensors"}
    base, last = both.run()[0], None

    def step(what: str, moves: bool, *args: Any, call: Any = None, **kwargs: Any) -> None:
        nonlocal last
        if what:
            for pipe in (ours, reference):
                getattr(pipe, what)(*args, **kwargs)
        a, b = both.run(**(call or {}))
        assert rel_rms(a, b) < COMPAT_LATENTS, what
        assert ours.get_list_adapters() == reference.get_list_adapters()
        assert ours.get_active_adapters() == (reference.get_active_adapters() if ours.get_list_adapters() else [])
        assert (rel_rms(a, base if last is None else last) > 0.01) == moves, what
        last = a

    step("load_lora_weights", True, str(tmp_path / "a"), **file)
    step("", True, call={"attention_kwargs": {"scale": 0.5}})
    step("set_adapters", False, "default_0", 0.5)
    step("", True, call={"attention_kwargs": {"scale": 0.5}})
    step("set_adapters", True, ["default_0"])
    step("load_lora_weights", True, str(tmp_path / "b"), adapter_name="second", **file)
    step("set_adapters", True, ["default_0", "second"], [0.25, -1.0])
    step("fuse_lora", False, components=["transformer"], lora_scale=1.0)
    step("unfuse_lora", False)
    step("fuse_lora", True, lora_scale=0.5)
    step("unfuse_lora", False)
    step("disable_lora", True)
    step("enable_lora", True)
    step("delete_adapters", True, "default_0")
    step("unload_lora_weights", True)
    assert torch.equal(last, base)  # pyright: ignore[reportArgumentType]
    for name, scale, wanted in (("nothing", 1.0, "one of"), ("scale", 0.5, "no adapter, want")):
        with pytest.raises(ValueError, match=f"attention_kwargs: got .*{wanted if name == 'scale' else name}"):
            ours(**both.inputs(attention_kwargs={name: scale}))
    with pytest.raises(ValueError, match="adapter_names: got 'none', want one of"):
        ours.set_adapters("none")


# Parts and loading


def test_parts_of_other_checkpoints(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    """A VAE, a transformer and transformers' own T5 that were loaded alone."""
    both = pair("t2v")
    vae = tiny_vae(5, latent_channels=16, scaling_factor=0.7)
    vae.save_pretrained(tmp_path / "vae")
    other, _ = tiny_pipeline("5b", seed=7)
    other.transformer.save_pretrained(tmp_path / "transformer")
    t5 = tiny_encoder(both.reference.text_encoder.config.vocab_size, seed=9)
    given: dict[str, Any] = {
        "vae": compat.AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32),
        "transformer": compat.CogVideoXTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer"),
    }
    reference = diffusers.CogVideoXPipeline(
        **{**both.reference.components, "vae": vae, "transformer": other.transformer, "text_encoder": t5}
    )
    reference.set_progress_bar_config(disable=True)
    ours = compat.CogVideoXPipeline.from_pretrained(both.directory, text_encoder=t5, **given)
    ours.set_progress_bar_config(disable=True)
    mixed = Pair("t2v", reference, ours, both.directory)
    assert rel_rms(mixed.same(), both.same()) > 0.1
    a, b = mixed.run(output_type="np", num_inference_steps=1)
    assert a.shape == b.shape
    assert np.abs(a - b).max() < 1e-3
    assert ours.transformer.config.num_layers == other.transformer.config.num_layers
    assert ours.vae.config["scaling_factor"] == 0.7
    assert set(ours.components) == set(reference.components)


def test_pipelines_share_weights(pair: Callable[[str], Pair]) -> None:
    """As the authors' page does it: two tasks with one model in memory."""
    pipe = compat.CogVideoXPipeline.from_pretrained(pair("t2v").directory)
    same = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    task = compat.CogVideoXVideoToVideoPipeline
    video = task.from_pretrained(pair("t2v").directory, scheduler=pipe.scheduler, **same)
    also = task.from_pipe(pipe)
    assert pipe.core is video.core is also.core
    assert video.scheduler is also.scheduler is pipe.scheduler


def test_dtype_and_device(pair: Callable[[str], Pair]) -> None:
    directory = pair("t2v").directory
    pipe = compat.CogVideoXPipeline.from_pretrained(directory)
    assert (pipe.dtype, pipe.device) == (torch.float32, torch.device("cpu"))
    assert pipe.to(torch.bfloat16).to("cpu", dtype=torch.bfloat16) is pipe
    assert (pipe.dtype, pipe.vae.dtype, pipe.transformer.device.type) == (torch.bfloat16, torch.bfloat16, "cpu")
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**pair("t2v").inputs(), generator=generator()).frames
    core = cogvid.load(directory, device="cpu", dtype="bfloat16", defaults="diffusers")
    core.model = dataclasses.replace(core.model, max_sequence_length=TEXT_LEN, sampler="ddim")
    given = {n: v for n, v in pair("t2v").inputs().items() if n != "max_sequence_length"}
    assert torch.equal(made, core(**given, generator=generator(), progress=False).frames)
    assert pipe.transformer.module is pipe.core.transformer
    with pytest.raises(ValueError, match=r"dtype: got torch\.float32 after the modules were handed out, want"):
        pipe.to(torch.float32)


def test_options_of_cogvid_pass_through(pair: Callable[[str], Pair]) -> None:
    pipe = compat.CogVideoXPipeline.from_pretrained(pair("t2v").directory, qk_norm="rms", dtype=torch.float32)
    assert pipe.core.placement.qk_norm == "rms"


def test_the_vae_alone(tmp_path: Path) -> None:
    """What the authors' script for the VAE calls."""
    reference: Any = tiny_vae(2)
    reference.save_pretrained(tmp_path)
    ours = compat.AutoencoderKLCogVideoX.from_pretrained(tmp_path, torch_dtype=torch.float32).to("cpu")
    ours.enable_slicing()
    x = torch.rand(2, 3, 9, 48, 64, generator=generator()) * 2 - 1
    posterior, theirs = ours.encode(x), reference.encode(x)
    assert rel_rms(posterior.latent_dist.mode(), theirs.latent_dist.mode()) < VAE_FP32
    z = posterior[0].sample(generator())
    assert rel_rms(z, theirs[0].sample(generator())) < VAE_FP32
    assert rel_rms(ours.decode(z).sample, reference.decode(z).sample) < VAE_FP32
    assert torch.equal(ours.decode(z, return_dict=False)[0], ours.decode(z).sample)
    assert ours.config.latent_channels == reference.config.latent_channels


def test_fun_control(tmp_path: Path) -> None:
    """With DDIM: diffusers' own loop calls the DPM scheduler wrongly in this pipeline."""
    plain, spiece = tiny_pipeline("5b", in_channels=32)
    reference: Any = diffusers.CogVideoXFunControlPipeline(**plain.components)
    reference.set_progress_bar_config(disable=True)
    directory = save_pipeline(reference, spiece, tmp_path)
    ours = compat.CogVideoXFunControlPipeline.from_pretrained(directory)
    ours.set_progress_bar_config(disable=True)
    both = Pair("control", reference, ours, directory)
    made = []
    for control in (CLIP, [picture(64, 96, seed=9 + i) for i in range(9)]):
        given = both.inputs(control_video=control)
        del given["num_frames"]
        a, b = (pipe(**given, generator=generator())[0] for pipe in (ours, reference))
        assert rel_rms(a, b) < COMPAT_LATENTS
        made.append(a)
    assert rel_rms(*made) > 0.001


# Errors


BOTH_REFUSE: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt, prompt_embeds: got neither"),
    "both": ({"prompt_embeds": torch.zeros(1, TEXT_LEN, 40)}, "prompt, prompt_embeds: got both"),
    "kind of prompt": ({"prompt": 3}, "prompt: got 3, want a string"),
    "negative": ({"negative_prompt": OTHER, "negative_prompt_embeds": torch.zeros(1, TEXT_LEN, 40)}, "got both"),
    "negatives": ({"prompt": [PROMPT, OTHER, PROMPT], "negative_prompt": [OTHER] * 2}, "negative_prompt: got 2"),
    "size": ({"height": 60}, "height: got 60, want a multiple of 16"),
    "generators": ({"generator": lambda: [generator(), generator()]}, "generator: got a list of 2"),
    "tensors": ({"callback_on_step_end_tensor_inputs": ["image_latents"]}, "callback_on_step_end_tensor_inputs: got"),
    "timesteps": ({"timesteps": [999, 500]}, "timesteps: got some, want None"),
    "strength": ({"strength": 1.5}, "strength: got 1.5"),
}


@pytest.mark.parametrize("case", BOTH_REFUSE)
def test_what_diffusers_refuses_is_refused_in_one_line(pair: Callable[[str], Pair], case: str) -> None:
    both = pair("v2v" if case == "strength" else "t2v")
    changes, message = BOTH_REFUSE[case]
    given = {n: v() if callable(v) else v for n, v in both.inputs(**changes).items()}
    with pytest.raises(ValueError, match=message) as error:
        both.ours(**given)
    assert "\n" not in str(error.value)
    with pytest.raises((ValueError, TypeError)):
        both.reference(**given)


def test_image_to_video_wants_an_image(pair: Callable[[str], Pair]) -> None:
    for pipe in (pair("i2v").ours, pair("i2v").reference):
        with pytest.raises(TypeError, match="image"):
            pipe(prompt=PROMPT)


def test_the_ported_script_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of the README's comparison, on a shipped pack, on the CPU, in float32, with 17 frames and 2 steps."""
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text()
    [block] = re.findall(r"```diff\n(.*?)```", text[text.index("## Port a diffusers script") :], re.DOTALL)
    changes = {
        "zai-org/CogVideoX-5b-I2V": str(find("tiny-i2v")),
        "bfloat16": "float32",
        "cuda": "cpu",
        "scripts/demo.png": str(root / "scripts" / "demo.png"),
        "callback_on_step_end=": "num_frames=17, num_inference_steps=2, callback_on_step_end=",
    }
    for before, after in changes.items():
        assert block.count(before) == 1
        block = block.replace(before, after)
    made: dict[str, Any] = {}
    for side in "-+":
        lines = [line[1:] for line in block.splitlines() if line[:1] in ("", " ", side)]
        if side == "-":  # diffusers writes videos with imageio or OpenCV, which the tests do not need
            lines = [line for line in lines if not line.startswith("export_to_video")]
        namespace: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec("\n".join(lines), namespace)
        made[side] = np.stack([np.asarray(frame) for frame in namespace["out"].frames[0]]).astype(int)
        assert namespace["pipe"].guidance_scale == pytest.approx(6.2)
    assert made["+"].shape == made["-"].shape == (17, 64, 64, 3)
    assert np.abs(made["+"] - made["-"]).max() <= 1
    assert cogvid.read_video(tmp_path / "out.mp4")[0].shape == (17, 64, 64, 3)

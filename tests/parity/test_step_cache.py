"""Step caches and guidance by steps against diffusers' own: the same steps skipped, the same latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast
from torch import Generator, Tensor, nn, tensor

import cogvid
from cogvid.sampling import cache
from measure import rel_rms
from references import TEXT_LEN, picture, save_pipeline, tiny_pipeline
from tests import tolerances
from tests.schedulers import SCHEDULERS

PROMPT, NEGATIVE = "a red", "two dogs"
SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 10}
GUIDED: dict[str, Any] = {"guidance_scale": 2.0, "use_dynamic_cfg": False}
PLAIN: dict[str, Any] = {"guidance_scale": 1.0, "use_dynamic_cfg": False}

Pair = tuple[Any, cogvid.Pipeline]


def make_pair(variant: str, directory: Path) -> Pair:
    """The same tiny model in diffusers and here, with four layers, so that a skip leaves out several."""
    reference, spiece = tiny_pipeline(variant, num_layers=4)
    return reference, cogvid.load(save_pipeline(reference, spiece, directory), device="cpu")


def run_reference(
    pipe: Any, scheduler: str, scales: list[float] | None = None, **options: Any
) -> tuple[Tensor, list[int]]:
    """Return the latents, and the steps in which the second block's attention was not computed.

    scales: the guidance of each step, set from the callback.
    """
    counter = Counter(pipe.transformer.transformer_blocks[1].attn1.to_q)

    def on_step(pipe: Any, index: int, _timestep: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        counter.end_of_step()
        if scales is not None and index + 1 < len(scales):
            pipe._guidance_scale = scales[index + 1]
        return values

    pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
    options |= {"negative_prompt": NEGATIVE, "max_sequence_length": TEXT_LEN, "output_type": "latent"}
    if scales is not None:
        options["guidance_scale"] = scales[0]
    out = pipe(prompt=PROMPT, **options, generator=Generator().manual_seed(3), callback_on_step_end=on_step)
    return out.frames, counter.skipped


def run_ours(pipe: cogvid.Pipeline, scheduler: str, **options: Any) -> tuple[Tensor, list[int], list[int] | None]:
    """Return the latents, the steps in which the second block's attention was not computed, and what the run says."""
    counter = Counter(pipe.transformer.blocks[1].q_proj)
    options |= {"negative_prompt": NEGATIVE, "scheduler": scheduler, "output_type": "latent", "progress": False}
    generator = Generator().manual_seed(3)
    out = pipe(PROMPT, **options, generator=generator, callback_on_step_end=lambda *_: counter.end_of_step())
    counter.handle.remove()
    return out.frames, counter.skipped, out.skipped_steps


class Counter:
    """Which steps ran no call of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.steps, self.skipped, self.calls = 0, [], 0
        self.handle = module.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.calls += 1

    def end_of_step(self) -> None:
        if not self.calls:
            self.skipped.append(self.steps)
        self.steps, self.calls = self.steps + 1, 0


@pytest.fixture
def distances(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The distances that a cache compares with its threshold."""
    seen: list[float] = []
    distance = cache._distance

    def noting(now: Tensor, before: Tensor) -> float:
        seen.append(distance(now, before))
        return seen[-1]

    monkeypatch.setattr(cache, "_distance", noting)
    return seen


@pytest.mark.parametrize(
    ("variant", "scheduler", "guidance", "threshold"),
    [
        ("5b", "dpm", GUIDED, 1.05),
        ("2b", "ddim", PLAIN, 0.75),
        ("1.5-5b-i2v", "dpm", PLAIN, 0.6),
        ("5b-i2v", "ddim", GUIDED, 0.8),
    ],
    ids=["5b", "2b", "1.5-5b-i2v", "5b-i2v"],
)
def test_first_block_cache(
    tmp_path: Path,
    distances: list[float],
    variant: str,
    scheduler: str,
    guidance: dict[str, Any],
    threshold: float,
) -> None:
    reference, ours = make_pair(variant, tmp_path)
    options = SIZE | guidance | ({"image": picture(50, 70)} if variant.endswith("i2v") else {})
    actual, skipped, said = run_ours(ours, scheduler, **options, step_cache=f"first-block={threshold}")
    uncached, *_ = run_ours(ours, scheduler, **options)
    apply_first_block_cache(reference.transformer, FirstBlockCacheConfig(threshold=threshold))
    expected, theirs = run_reference(reference, scheduler, **options)
    assert min(abs(distance - threshold) for distance in distances) > 0.03 * threshold  # no tie
    assert skipped == theirs == said
    assert 2 <= len(skipped) <= 7
    assert rel_rms(actual, expected) <= tolerances.STEP_CACHE_LATENTS
    assert rel_rms(actual, uncached) > 100 * tolerances.STEP_CACHE_LATENTS


@pytest.mark.parametrize(
    ("variant", "scheduler", "guidance", "every", "low", "high"),
    [("5b", "dpm", GUIDED, 2, 100, 800), ("2b", "ddim", PLAIN, 3, 0, 950), ("1.5-5b-i2v", "dpm", PLAIN, 4, 299, 700)],
    ids=["5b", "2b", "1.5-5b-i2v"],
)  # fmt: skip
def test_pyramid_attention_broadcast(
    tmp_path: Path, variant: str, scheduler: str, guidance: dict[str, Any], every: int, low: int, high: int
) -> None:
    reference, ours = make_pair(variant, tmp_path)
    options = SIZE | guidance | ({"image": picture(50, 70)} if variant.endswith("i2v") else {})
    actual, skipped, said = run_ours(ours, scheduler, **options, step_cache=f"pyramid={every}:range={low}-{high}")
    uncached, *_ = run_ours(ours, scheduler, **options)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=(low, high),
        current_timestep_callback=lambda: reference.current_timestep,
    )
    apply_pyramid_attention_broadcast(reference.transformer, config)
    expected, theirs = run_reference(reference, scheduler, **options)
    assert skipped == theirs == said
    assert skipped
    assert rel_rms(actual, expected) <= tolerances.STEP_CACHE_LATENTS
    assert rel_rms(actual, uncached) > 100 * tolerances.STEP_CACHE_LATENTS


IDENTITY = "1/0"
OF_15_I2V = "1.22842302e02/-1.04088754e02/2.62981677e01/-3.06009921e-01/3.71213220e-02"
# What the authors' own file makes of the same pipelines: TeaCache4CogVideoX1.5/teacache_sample_video.py of
# https://github.com/ali-vilab/TeaCache, commit 7c10efc, its `teacache_forward` put in place of the transformer's in the
# pipeline of `run_reference`, with its attributes set as its `main` does. The steps that it skips, and six latents.
AUTHORS = [
    (
        "5b", "dpm", GUIDED, 1.0, IDENTITY, [1, 3, 5, 8],
        [2.206514835, -0.192825183, -0.059945777, 2.579667330, 2.395777225, 0.139639765],
    ),
    (
        "1.5-5b-i2v", "ddim", PLAIN, 3.0, OF_15_I2V, [1, 3, 4, 7],
        [-3.264453173, 0.067242488, -1.276491404, 2.038770199, 0.542212248, 0.444079220],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "scheduler", "guidance", "threshold", "coefficients", "skips", "latents"),
    AUTHORS,
    ids=["5b", "1.5-5b-i2v"],
)
def test_teacache_is_that_of_its_authors(
    tmp_path: Path,
    variant: str,
    scheduler: str,
    guidance: dict[str, Any],
    threshold: float,
    coefficients: str,
    skips: list[int],
    latents: list[float],
) -> None:
    _, ours = make_pair(variant, tmp_path)
    options = SIZE | guidance | ({"image": picture(50, 70)} if variant.endswith("i2v") else {})
    for factor in (0.98, 1.02, 1.0):  # no tie
        named = f"teacache={factor * threshold}:coefficients={coefficients}"
        actual, skipped, said = run_ours(ours, scheduler, **options, step_cache=named)
        assert skipped == said == skips
    picked = actual.flatten()[:: actual.numel() // 6][:6]
    assert rel_rms(picked, tensor(latents)) <= tolerances.STEP_CACHE_LATENTS


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_list_of_scales_is_a_guidance_changed_from_the_callback(tmp_path: Path, scheduler: str) -> None:
    reference, ours = make_pair("5b", tmp_path)
    scales = [6.0, 5.5, 4.0, 7.25, 1.0, 0.5, 3.0, 2.0, 1.5, 2.5]
    expected, _ = run_reference(reference, scheduler, scales=scales, **SIZE)
    actual, *_ = run_ours(ours, scheduler, **SIZE, use_dynamic_cfg=scales)
    assert rel_rms(actual, expected) <= tolerances.PIPELINE_LATENTS
    constant, *_ = run_ours(ours, scheduler, **SIZE, use_dynamic_cfg=[6.0] * 10)
    assert rel_rms(constant, expected) > 100 * tolerances.PIPELINE_LATENTS

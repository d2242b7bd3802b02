"""Classifier-free guidance: how it is applied, and the rules that give its scale at each step.

A rule is a function of (guidance_scale, step index, schedule). It returns the scale of that step, or None to skip the
unconditional branch there. `GUIDANCE` holds the rules by name; add your own to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cogvid.sampling.schedule import Schedule

Guidance = Callable[[float, int, Schedule], float | None]


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Return uncond + scale (cond - uncond), in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(uncond.dtype, torch.float32)
    uncond, cond = uncond.to(wide), cond.to(wide)
    return uncond + scale * (cond - uncond)


def constant(guidance_scale: float, index: int, schedule: Schedule) -> float:  # noqa: ARG001 - a rule's signature
    """Take the same scale at each step."""
    return guidance_scale


def diffusers(guidance_scale: float, index: int, schedule: Schedule) -> float:
    """Take the dynamic guidance of the official pipelines, 1 + scale (1 - cos(pi p^5)) / 2.

    Here p = (steps - t) / steps, and t is the training timestep (999 ... 0), not the step index. So the scale swings
    between 1 and 1 + guidance_scale almost at random.
    """
    steps = len(schedule)
    return _swing(guidance_scale, (steps - schedule.timesteps[index]) / steps)


def cosine(guidance_scale: float, index: int, schedule: Schedule) -> float:
    """Take the curve of `diffusers` over progress, p = step index / steps: it rises smoothly from 1."""
    return _swing(guidance_scale, index / len(schedule))


def falling(guidance_scale: float, index: int, schedule: Schedule) -> float:
    """Take the curve of `diffusers` with the step index as t, p = (steps - index) / steps: it falls smoothly to 1.

    So guidance is strong in the early, noisy steps, which is how dynamic guidance is commonly described.
    """
    return _swing(guidance_scale, (len(schedule) - index) / len(schedule))


GUIDANCE: dict[str, Guidance] = {"constant": constant, "diffusers": diffusers, "cosine": cosine, "falling": falling}


def guidance_schedule(guidance_scale: float, schedule: Schedule, rule: str = "constant") -> list[float | None]:
    """Return the scale of each step by the rule of this name; None at all steps if `guidance_scale` is 1 or less.

    Raises:
        ValueError: an unknown name, or a rule that gives something else than a finite number or None.
    """
    if rule not in GUIDANCE:
        raise ValueError(f"use_dynamic_cfg: got {rule!r}, want one of {', '.join(GUIDANCE)}")
    if guidance_scale <= 1:
        return [None] * len(schedule)
    scales = [GUIDANCE[rule](guidance_scale, index, schedule) for index in range(len(schedule))]
    for index, scale in enumerate(scales):
        if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
            raise ValueError(f"use_dynamic_cfg: got {scale!r} from {rule!r} at step {index}, want a number or None")
    return scales


def _swing(guidance_scale: float, progress: float) -> float:
    return 1 + guidance_scale * ((1 - math.cos(math.pi * progress**5.0)) / 2)

"""The record of a run: its inputs, options, schedule, placement and versions, ready for JSON."""

from __future__ import annotations

import platform
from typing import Any

import torch

import cogvid
from cogvid.run.settings import Settings
from cogvid.sampling.guidance import guidance_schedule
from cogvid.sampling.schedule import Schedule
from cogvid.weights.checkpoint import Checkpoint
from cogvid.weights.placement import Placement


def make_record(
    checkpoint: Checkpoint, placement: Placement, settings: Settings, schedule: Schedule, **inputs: Any
) -> dict[str, Any]:
    """Return the record of a run. inputs: what the call was given beside its options, and `qk_norm`."""
    scales = guidance_schedule(settings.guidance_scale, schedule, settings.use_dynamic_cfg)
    return {
        **inputs,
        "model": checkpoint.model.name,
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "variant": checkpoint.variant,
        "defaults": checkpoint.defaults,
        "max_sequence_length": checkpoint.model.text_length,
        **settings.to_dict(),
        "timesteps": list(schedule.timesteps),
        "guidance_schedule": scales if settings.guided else None,
        "fps": checkpoint.model.fps,
        "device": str(placement.device),
        "dtype": str(placement.dtype).removeprefix("torch."),
        "ops": placement.ops_name,
        "versions": {
            "cogvid": cogvid.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }

"""The way of the latents through a run, in a file.

A file is safetensors: `latents` and `x0`, each fp32 `[steps, B, T, C, h, w]`, and `timesteps`, int64 `[steps]`.
`latents[i]` is what step i left, `x0[i]` the clean latents that the network predicted in it, `timesteps[i]` where it
began. The header has the run's record, as JSON under `record`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogvid.media.download import shown
from cogvid.weights.files import write_whole


@dataclass
class Trajectory:
    """Latents and predictions of the steps so far, on the CPU; see the file. record: of the run."""

    latents: list[Tensor] = field(default_factory=list)
    x0: list[Tensor] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def add(self, timestep: int, tensors: dict[str, Tensor]) -> None:
        """Keep a step. tensors: what the pipeline gives its callback."""
        if "x0" not in tensors:
            raise ValueError(
                "scheduler: got a sampler that does not call `step.x0`, want one that predicts clean latents"
            )
        self.latents.append(tensors["latents"].float().cpu().clone())
        self.x0.append(tensors["x0"].float().cpu().clone())
        self.timesteps.append(timestep)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        tensors = {"latents": torch.stack(self.latents), "x0": torch.stack(self.x0)}
        tensors["timesteps"] = torch.tensor(self.timesteps)
        metadata = {"record": json.dumps(self.record, sort_keys=True)}
        write_whole(Path(path), lambda partial: save_file(tensors, partial, metadata))


def load_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    """Read a trajectory.

    Raises:
        ValueError: the file is not a trajectory.
    """
    name, wanted = shown(os.fspath(path)), "want a file of --save-trajectory"
    if not os.path.isfile(path):
        raise ValueError(f"trajectory: got {name}, which is no file, {wanted}")
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            tensors = {each: file.get_tensor(each) for each in names & {"latents", "x0", "timesteps"}}
    except SafetensorError as error:
        raise ValueError(f"trajectory: got {name}, which is no safetensors file ({error}), {wanted}") from error
    try:
        record = json.loads(metadata.get("record", ""))
    except ValueError:
        record = None
    latents, x0, timesteps = (tensors.get(each) for each in ("latents", "x0", "timesteps"))
    if latents is None or x0 is None or timesteps is None or not isinstance(record, dict):
        raise ValueError(f"trajectory: got {name}, which holds {', '.join(sorted(names))[:80]}, {wanted}")
    if latents.ndim != 6 or x0.shape != latents.shape or timesteps.shape != latents.shape[:1] or not len(timesteps):
        raise ValueError(f"trajectory: got {name} with latents {list(latents.shape)}, want [steps, B, T, C, h, w]")
    return Trajectory(list(latents), list(x0), timesteps.tolist(), record)

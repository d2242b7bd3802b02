"""A pipeline on several processes, each with a device: what all agree on, what one does for all, what is split."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from cogvid.media.image import load_image
from cogvid.parallel.mesh import Mesh, make_mesh
from cogvid.parallel.shard import shard_weights
from cogvid.parallel.share import agree, share
from cogvid.parallel.transformer import split_transformer
from cogvid.parallel.vae import split_vae
from cogvid.run.given import IMAGES, is_picture
from cogvid.run.output import Output
from cogvid.run.pipeline import Pipeline
from cogvid.run.saved_run import SavedRun
from cogvid.weights.checkpoint import Checkpoint
from cogvid.weights.parallel_option import rank
from cogvid.weights.placement import Placement


class ParallelPipeline(Pipeline):
    """Generate each video with all processes, which must make the same calls; `cogvid.load` makes it.

    Every process returns the same output, bit for bit. Before a call begins, the processes compare its arguments, and
    if one has others, all raise. Rank 0 reads the pictures, encodes the text, shows the bar, and saves the run. The
    frames of "stream" are decoded by all processes together, so all must take them. A callback runs in every process.

    mesh: the processes and how they share the work.
    """

    mesh: Mesh

    @functools.wraps(Pipeline.__call__)
    def __call__(self, prompt: Any = None, *, saved_run: SavedRun | None = None, **given: Any) -> Output:
        agree({"prompt": prompt, "saved_run": saved_run and saved_run.directory, **given})
        if saved_run is not None:
            saved_run.mesh = self.mesh
        for name in (*IMAGES, "mask"):
            given[name] = share(functools.partial(_read, given.get(name)))
        given["progress"] = given.get("progress", True) and rank() == 0
        out = super().__call__(prompt, saved_run=saved_run, **given)
        return dataclasses.replace(out, provenance=share(lambda: out.provenance))


def agree_on_load(checkpoint: Checkpoint, placement: Placement) -> None:
    """Raise in every process unless all load the same weights in the same way."""
    agree({"model": checkpoint.model.name, "weights": checkpoint.weights, **placement.to_dict()})


def parallelize(pipe: Pipeline) -> Pipeline:
    """Return a pipeline that shares its work as its placement says; in one process, the pipeline itself."""
    if pipe.placement.parallel is None:
        return pipe
    if pipe.device.type == "cuda":
        torch.cuda.set_device(pipe.device)
    mesh = make_mesh(pipe.placement.parallel, pipe.device)
    split_transformer(pipe.transformer, mesh)
    split_vae(pipe.vae, mesh)
    if pipe.placement.shard_weights:
        shard_weights(pipe.transformer, pipe.text_encoder, mesh)
    pipe.__class__ = ParallelPipeline
    assert isinstance(pipe, ParallelPipeline)
    pipe.mesh = mesh
    return pipe


def _read(value: Any) -> Any:
    """Load the pictures among an argument; videos stay as they are."""
    if isinstance(value, (list, tuple)):
        return [load_image(each) if is_picture(each) else each for each in value]
    return load_image(value) if is_picture(value) else value

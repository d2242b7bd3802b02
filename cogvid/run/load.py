"""Load a pipeline."""

from __future__ import annotations

import os

import torch

from cogvid import versions
from cogvid.ops import Ops
from cogvid.run.pipeline import Pipeline
from cogvid.run.settings import check_choice
from cogvid.weights.checkpoint import Checkpoint, read_checkpoint
from cogvid.weights.files import DTYPES, load_state
from cogvid.weights.hub import COMPONENTS, WEIGHTS
from cogvid.weights.load import QK_NORMS, make_text_encoder, make_transformer, make_vae
from cogvid.weights.placement import Placement, resolve_device, resolve_dtype, resolve_ops


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    ops: str | Ops = "auto",
    defaults: str = "recommended",
    revision: str | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    qk_norm: str = "layer",
    hash_weights: bool = False,
) -> Pipeline:
    """Load a model: a shipped pack, a directory in the official layout, or a hub id, which is fetched.

    Args:
        device: None is CUDA where there is a GPU, else the CPU.
        dtype: "float32", "bfloat16" or "float16"; None is what the model's authors recommend.
        ops: "torch", "triton", "auto" (triton on CUDA, torch elsewhere), or an `Ops`.
        defaults: of a call's options: "recommended" by the model's authors, or those of "diffusers", so that a call
            ported from there gives the same video.
        revision: branch, tag or commit of a hub id. local_files_only: take a hub id from the local cache.
        variant: which of several sets of weights to load, by the infix of its files' names, such as "fp16"; a part that
            lacks it is loaded from its plain files, with a warning. It does not choose the dtype.
        qk_norm: "layer", which is exact, or "rms": the Q and K norms run as RMSNorm, see `make_transformer`.
        hash_weights: put a SHA-256 over all weights into records, which reads the files whole; see `weights_identity`.
    """
    versions.check()
    check_choice("qk_norm", qk_norm, QK_NORMS)
    device = resolve_device(device)
    bundle, ops_name = resolve_ops(ops, device)
    checkpoint = read_checkpoint(
        source,
        defaults=defaults,
        revision=revision,
        local_files_only=local_files_only,
        variant=variant,
        hash_weights=hash_weights,
    )
    # Decided once, so that all three parts agree and a warning is given once.
    dtype = resolve_dtype(dtype, device, stored=DTYPES[checkpoint.model.dtype])
    return load_checkpoint(checkpoint, Placement(device, dtype, bundle, ops_name), qk_norm)


def load_checkpoint(checkpoint: Checkpoint, placement: Placement, qk_norm: str = "layer") -> Pipeline:
    """Load all parts of a checkpoint that was found. placement: their device, dtype and operations."""
    directory = checkpoint.directory
    states = {
        part: load_state(directory / part, basename, checkpoint.variants[part]) for part, basename in WEIGHTS.items()
    }
    _ = checkpoint.weights  # now, so that the record tells of the files that were loaded
    model, folders = checkpoint.model, {part: directory / part for part in COMPONENTS}
    return Pipeline(
        checkpoint,
        placement,
        transformer=make_transformer(
            model.transformer, states["transformer"], placement, folders["transformer"], qk_norm
        ),
        vae=make_vae(model.vae, states["vae"], placement, folders["vae"]),
        text_encoder=make_text_encoder(
            folders["text_encoder"], folders["tokenizer"], states["text_encoder"], placement
        ),
        qk_norm=qk_norm,
    )

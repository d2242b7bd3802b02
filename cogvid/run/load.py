"""Load a pipeline."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from cogvid import versions
from cogvid.options import takes_options
from cogvid.parallel.share import agree, all_or_none
from cogvid.parallel.text import SharedEncoder
from cogvid.run.compiled import compile_modules
from cogvid.run.memory import Offload
from cogvid.run.pipeline import Pipeline
from cogvid.weights.checkpoint import Checkpoint, read_checkpoint
from cogvid.weights.files import load_state
from cogvid.weights.hub import COMPONENTS, WEIGHTS
from cogvid.weights.load import make_text_encoder, make_transformer, make_vae, read_tokenizer
from cogvid.weights.load_options import LOAD_OPTIONS
from cogvid.weights.lora_file import read_lora
from cogvid.weights.parallel_option import rank
from cogvid.weights.placement import Placement, resolve_placement, with_split


@takes_options(LOAD_OPTIONS, "options: the fields of `LoadOptions`.")
def load(
    source: str | os.PathLike[str],
    *,
    defaults: str = "recommended",
    revision: str | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    hash_weights: bool = False,
    **options: Any,
) -> Pipeline:
    """Load a model: a shipped pack, a directory in the official layout, or a hub id, which is fetched.

    Under torchrun all processes load it and make each video together; they must make the same calls.

    Args:
        defaults: of a call's options: "recommended" by the model's authors; those of "diffusers", so that a call
            ported from there gives the same video; or "sat", what the authors' own code does where the two differ.
        revision: branch, tag or commit of a hub id. local_files_only: take a hub id from the local cache.
        variant: which of several sets of weights to load, by the infix of its files' names, such as "fp16"; a part that
            lacks it is loaded from its plain files, with a warning. It does not choose the dtype.
        hash_weights: put a SHA-256 over all weights into records, which reads the files whole; see `weights_identity`.
        options: the fields of `LoadOptions`.
    """
    versions.check()
    named = {"defaults": defaults, "revision": revision, "variant": variant, "hash_weights": hash_weights}
    agree({"source": source, **named, **options})
    with all_or_none():
        place = resolve_placement(**options)
        checkpoint = read_checkpoint(source, local_files_only=local_files_only, **named)
        placement = place(checkpoint.model.dtype, checkpoint.model.follows)
    return load_checkpoint(checkpoint, placement, local_files_only=local_files_only)


def load_checkpoint(checkpoint: Checkpoint, placement: Placement, local_files_only: bool = False) -> Pipeline:
    """Load all parts of a checkpoint that was found. placement: where and how all of them run, and with what adapters.

    local_files_only: take the adapters from the local cache.
    """
    placement = with_split(placement, checkpoint.model)
    if placement.parallel is None:
        return _load(checkpoint, placement, local_files_only)
    from cogvid.run import parallel  # here, because it takes a second to import

    parallel.agree_on_load(checkpoint, placement)
    with all_or_none():
        pipe = _load(checkpoint, placement, local_files_only)
    return parallel.parallelize(pipe)


def _load(checkpoint: Checkpoint, placement: Placement, local_files_only: bool) -> Pipeline:
    """Load what this process needs of a checkpoint: all of it, but T5, unless sharded, in the first process alone."""
    config = checkpoint.model.transformer
    adapters = [read_lora(each, config, local_files_only=local_files_only) for each in placement.lora]
    directory = checkpoint.directory
    encodes = rank() == 0 or placement.shard_weights
    states = {
        part: load_state(directory / part, basename, checkpoint.variants[part])
        for part, basename in WEIGHTS.items()
        if encodes or part != "text_encoder"
    }
    _ = checkpoint.weights  # now, so that the record tells of the files that were loaded
    model, folders = checkpoint.model, {part: directory / part for part in COMPONENTS}
    transformer = make_transformer(model.transformer, states["transformer"], placement, folders["transformer"])
    vae = make_vae(model.vae, states["vae"], placement, folders["vae"])
    encoder = None
    if encodes:
        encoder = make_text_encoder(folders["text_encoder"], folders["tokenizer"], states["text_encoder"], placement)
    if encoder is None or placement.parallel is not None:
        tokenizer = read_tokenizer(folders["tokenizer"])
        encoder = SharedEncoder(encoder, tokenizer, placement.device, sharded=placement.shard_weights)
    if placement.compile:
        compile_modules([*transformer.blocks, vae.decoder])
    pipe = Pipeline(checkpoint, placement, transformer=transformer, vae=vae, text_encoder=encoder)
    pipe.placement = dataclasses.replace(placement, lora=pipe.loras.add(adapters))
    if placement.offload is not None:
        pipe.offload = Offload(pipe, placement.offload)
    return pipe

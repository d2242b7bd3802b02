"""Convert the weights of the authors' own code (SAT) to the layout that cogvid and diffusers read, and back.

    python scripts/convert_sat.py from-sat --model cogvideox-5b --transformer 1/mp_rank_00_model_states.pt \\
        --vae 3d-vae.pt -o DIR
    python scripts/convert_sat.py to-sat DIR -o SAT_DIR

from-sat writes transformer/, vae/, scheduler/ and model_index.json; copy text_encoder/ and tokenizer/ from another
official checkpoint, whose are the same for all models. to-sat writes transformer/latest,
transformer/1/mp_rank_00_model_states.pt and vae/3d-vae.pt. Every tensor keeps its bits and, without --dtype, its dtype.

A .pt file is read with `weights_only=True`, so that none of its objects can run code, and mapped. from-sat holds one
shard in memory at a time, to-sat the matrices that SAT has joined.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import measure  # noqa: F401 - makes cogvid importable
from cogvid.config import CONFIGS, ScheduleConfig, TransformerConfig, VAEConfig
from cogvid.weights.checkpoint import CLASSES, PIPELINES, read_config
from cogvid.weights.files import DTYPES, load_state, write_whole
from cogvid.weights.hub import BASENAME, CONFIG_FILES, find
from cogvid.weights.load import config_json
from cogvid.weights.sat_names import transformer_from_sat, transformer_to_sat, vae_from_sat, vae_to_sat

MAX_SHARD = 5 * 10**9  # bytes of a file; upstream's converter has the same limit
PARTS: dict[str, Any] = {"transformer": TransformerConfig, "vae": VAEConfig, "scheduler": ScheduleConfig}
SAT_FILES = {"transformer": "transformer/1/mp_rank_00_model_states.pt", "vae": "vae/3d-vae.pt"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    here = commands.add_parser("from-sat", help="SAT's .pt files to safetensors")
    names = ", ".join(name for name, model in CONFIGS.items() if model.repo)
    here.add_argument("--model", required=True, help=f"{names}, or a directory with the configs of another model")
    here.add_argument("--transformer", type=Path, metavar="PT", help="mp_rank_00_model_states.pt")
    here.add_argument("--vae", type=Path, metavar="PT", help="3d-vae.pt, or the transformer's file if it has the VAE")
    here.add_argument("--dtype", choices=sorted(DTYPES), help="of the written weights; by default the stored one")
    there = commands.add_parser("to-sat", help="safetensors to SAT's .pt files")
    there.add_argument("source", help="a directory in the layout of diffusers, a pack, or a hub id that is here")
    for each in (here, there):
        each.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        if args.command == "from-sat":
            from_sat(args.model, {"transformer": args.transformer, "vae": args.vae}, args.output, args.dtype)
        else:
            there_is = Path(args.source).is_dir()
            to_sat(Path(args.source) if there_is else find(args.source, local_files_only=True), args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_sat: error: {error}")
    print(args.output)


def from_sat(
    model: str, files: Mapping[str, Path | None], output: Path, dtype: str | None = None, max_shard: int = MAX_SHARD
) -> None:
    """Write the parts that `files` names, and the configs of the model. The arguments are those of the command.

    Raises:
        ValueError: an unknown model, a file that is not plain tensors, or not of this model.
    """
    if not any(files.values()):
        raise ValueError("transformer, vae: got neither, want one of them or both")
    configs = _configs(model)
    mapped: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for part, file in files.items():
        if file is not None:
            change = transformer_from_sat if part == "transformer" else vae_from_sat
            mapped[part] = change(read_pt(file), configs[part], file)
    for part, tensors in mapped.items():  # after all files were checked
        write_sharded(tensors, output / part, DTYPES.get(dtype or ""), max_shard)
    for part, config in configs.items():
        if part in mapped or part == "scheduler":
            _write(output / part / Path(CONFIG_FILES[part]).name, config_json(part, config))
    if "transformer" in mapped:
        conditions = configs["transformer"].in_channels // configs["vae"].latent_channels - 1
        name = next(name for name, needs in PIPELINES.items() if len(needs) == conditions)
        library = {"text_encoder": "transformers", "tokenizer": "transformers"}
        parts = {part: [library.get(part, "diffusers"), classes[0]] for part, classes in CLASSES.items()}
        _write(output / "model_index.json", json.dumps({"_class_name": name, **parts}, indent=2) + "\n")


def to_sat(source: Path, output: Path) -> None:
    """Write SAT's files of a checkpoint: of the transformer and the VAE, or of the one that it has."""
    found = [part for part in SAT_FILES if (source / part).is_dir()]
    if not found:
        raise ValueError(f"{source}: got neither transformer/ nor vae/, want one of them or both")
    for part in found:
        folder = source / part
        change, key = (transformer_to_sat, "module") if part == "transformer" else (vae_to_sat, "state_dict")
        state = change(load_state(folder), read_config(folder, part, PARTS[part]), folder)
        path = output / SAT_FILES[part]
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch.save writes whole storages; a mapped tensor may lie in that of its file.
        own = {name: x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for name, x in state.items()}
        write_whole(path, partial(torch.save, {key: own}))
        if part == "transformer":
            _write(output / part / "latest", "1")


def read_pt(path: Path) -> dict[str, Tensor]:
    """Read a state dict of a .pt file, mapped: what lies under "model", "module" or "state_dict".

    Raises:
        ValueError: there is none, it has objects that are not plain data, or it is broken.
    """
    try:
        values: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: got a file with other objects than tensors ({reason:.150}), want weights") from None
    except (RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: got a broken file ({reason:.150}), want one of torch.save") from None
    for key in ("model", "module", "state_dict"):
        values = values.get(key, values) if isinstance(values, dict) else values
    if not isinstance(values, dict) or not values or not all(isinstance(x, Tensor) for x in values.values()):
        raise ValueError(f"{path}: got no state dict, want one of tensors under 'module' or 'state_dict'")
    return values


def write_sharded(
    tensors: Mapping[str, Callable[[], Tensor]], directory: Path, dtype: torch.dtype | None, max_shard: int
) -> None:
    """Write safetensors as upstream names them: one file, or shards of at most `max_shard` bytes and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {name: make().numel() * (dtype or make().dtype).itemsize for name, make in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard:
            shards.append([])
        shards[-1].append(name)
    files = [f"{BASENAME}.safetensors"]
    if len(shards) > 1:
        files = [f"{BASENAME}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for old in directory.glob(f"{BASENAME}*"):
        if old.name not in files:
            old.unlink()  # of an earlier conversion, which would be read with or instead of this one
    for file, names in zip(files, shards, strict=True):
        # A copy, because parts of one tensor share its memory, which safetensors refuses.
        state = {name: tensors[name]().to("cpu", dtype, copy=True).contiguous() for name in names}
        write_whole(directory / file, partial(save_file, state, metadata={"format": "pt"}))
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        _write(directory / f"{BASENAME}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _configs(model: str) -> dict[str, Any]:
    """Return the configs of a model of `CONFIGS`, or of a directory."""
    if model in CONFIGS:
        known = CONFIGS[model]
        return {"transformer": known.transformer, "vae": known.vae, "scheduler": known.schedule}
    if not Path(model).is_dir():
        raise ValueError(f"model: got {model!r}, want one of {', '.join(CONFIGS)} or a directory with configs")
    return {part: read_config(Path(model) / part, part, config) for part, config in PARTS.items()}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_text(text))


if __name__ == "__main__":
    main()

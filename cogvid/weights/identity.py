"""Say which weights a checkpoint has, by hashes that go into the record of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cogvid.weights.hub import COMPONENTS, CONFIG_FILES, TOKENIZER_FILES, WEIGHTS, weight_files

_CHUNK = 2**24  # bytes
_LONGEST = 100_000_000  # bytes; the safetensors library takes no longer header, and other files are far shorter


def weights_identity(directory: Path, variants: Mapping[str, str | None], full: bool = False) -> dict[str, Any]:
    """Return what tells the weights of a checkpoint from others, ready for JSON.

    headers: SHA-256 over all configs, the tokenizer, and the header and the size of each safetensors file. It costs
    nothing, because no weight is read. Two trainings of one architecture can have the same.
    commit, blobs: for a checkpoint in the hub's cache, the commit, and the blob id of each safetensors file, which the
    hub makes from its content. Other checkpoints have neither.
    sha256: with `full`, SHA-256 over the whole safetensors files.

    variants: of each component's weights, as in `Checkpoint`.

    Raises:
        ValueError: a config, the tokenizer or a header is longer than any that can be used.
    """
    files = list(_files(directory, variants))
    weights = [path for path in files if path.suffix == ".safetensors"]
    headers = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        headers.update(f"{path.relative_to(directory).as_posix()}\n{size}\n".encode())
        with path.open("rb") as file:
            length = min(8 + int.from_bytes(file.read(8), "little"), size) if path in weights else size
            if length > _LONGEST:
                what = "a header of " if path in weights else ""
                raise ValueError(f"{path}: got {what}{length} bytes, want at most {_LONGEST}")
            file.seek(0)
            headers.update(file.read(length))
    identity: dict[str, Any] = {"headers": headers.hexdigest()}
    if directory.parent.name == "snapshots":
        identity["commit"] = directory.name
        stored = {path.relative_to(directory).as_posix(): Path(os.path.realpath(path)) for path in weights}
        identity["blobs"] = {name: blob.name for name, blob in stored.items() if blob.parent.name == "blobs"}
    if full:
        identity["sha256"] = _content(weights)
    return identity


def _files(directory: Path, variants: Mapping[str, str | None]) -> Iterator[Path]:
    """Yield the files that a run reads, in an order of their own; those that are missing are left out."""
    names = ["model_index.json"]
    for part in COMPONENTS:
        folder = directory / part
        own = list(TOKENIZER_FILES) if part == "tokenizer" else [CONFIG_FILES[part]]
        if part in WEIGHTS and folder.is_dir():
            own += weight_files(os.listdir(folder), WEIGHTS[part], variants[part], folder)
        names += [f"{part}/{name}" for name in own]
    return (directory / name for name in names if (directory / name).is_file())


def _content(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()

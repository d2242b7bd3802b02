"""Find a checkpoint: a shipped pack, a directory, or a repository of the hub, which is fetched.

A checkpoint has the layout that diffusers' `save_pretrained` writes: `model_index.json` and a folder per component.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cogvid import versions
from cogvid.config import CONFIGS

PACKS = Path(__file__).parent / "packs"
BASENAME = "diffusion_pytorch_model"
COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
CONFIG_FILES = {name: "scheduler_config.json" if name == "scheduler" else "config.json" for name in COMPONENTS}
_WEIGHTS = {"transformer": BASENAME, "vae": BASENAME, "text_encoder": "model"}  # basenames of the safetensors
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def find(
    model: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    components: Iterable[str] = COMPONENTS,
) -> Path:
    """Return the directory of a checkpoint, fetching it if it is named by a hub id.

    Args:
        model: the name of a shipped pack, a directory, or a hub id such as "zai-org/CogVideoX-5b", in this order
            ("./tiny-i2v" is a directory whatever packs there are).
        revision: branch, tag or commit of a hub id.
        local_files_only: take a hub id from the local cache, and never from the network.
        components: what a hub id is fetched for.

    Raises:
        ValueError: no such model.
        OSError: the hub cannot be reached, or there is no room.
    """
    name = os.fspath(model)
    if name in packs():
        return PACKS / name
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise ValueError(f"model: {name} is a file, wanted the directory of a checkpoint")
    if _HUB_ID.fullmatch(name) and isinstance(model, str):
        return _fetch(name, revision, local_files_only, components)
    known = f"; its weights are {CONFIGS[name].repo}" if name in CONFIGS and CONFIGS[name].repo else ""
    raise ValueError(
        f"model: got {name!r}{known}; wanted a directory, a shipped pack ({', '.join(packs())}) or a hub id "
        f"such as {CONFIGS['cogvideox-5b-i2v'].repo}"
    )


def packs() -> list[str]:
    """Return the names of the shipped packs."""
    return sorted(path.parent.name for path in PACKS.glob("*/model_index.json"))


def _fetch(repo: str, revision: str | None, local_files_only: bool, components: Iterable[str]) -> Path:
    versions.check("huggingface_hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    files = ["model_index.json"]
    for component in components:
        names = ["spiece.model"] if component == "tokenizer" else [CONFIG_FILES[component]]
        if base := _WEIGHTS.get(component):
            names += [f"{base}.safetensors", f"{base}-*-of-*.safetensors", f"{base}.safetensors.index.json"]
        files += [f"{component}/{name}" for name in names]
    where = repo + (f" at {revision}" if revision else "")
    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": files,
        "local_files_only": local_files_only,
    }
    try:
        try:
            sizes = [
                file.file_size or 0 for file in snapshot_download(repo, dry_run=True, **options) if file.will_download
            ]
        except DryRunError:
            sizes = []  # no hub to be reached, or none wanted: it may all be in the local cache
        if sizes:
            print(f"fetching {where}: {len(sizes)} files, {sum(sizes) / 1e9:.3f} GB", file=sys.stderr)
        return Path(snapshot_download(repo, **options))
    except RevisionNotFoundError as error:
        raise ValueError(f"model: the hub has no revision {revision!r} of {repo}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"model: {repo} is no directory here and no repository of the hub that you can read"
        ) from error
    except LocalEntryNotFoundError as error:
        if local_files_only:
            raise ValueError(f"model: {where} is no directory here and not whole in the hub's local cache") from error
        raise OSError(f"model: {where} is no directory here, and the hub cannot be reached to fetch it") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        raise OSError(f"model: fetching {where} broke off: {error}; what is there is kept, try again") from error


def component_directory(model: str | Path, component: str) -> Path:
    """Return the directory of one component, given the checkpoint's (as for `find`) or the component's own."""
    directory = find(model, components=(component,))
    if (directory / component).is_dir():
        return directory / component
    if (directory / CONFIG_FILES[component]).is_file() and not (directory / "model_index.json").is_file():
        return directory
    raise ValueError(f"{directory}: neither a {component}/ nor a {CONFIG_FILES[component]} in it")

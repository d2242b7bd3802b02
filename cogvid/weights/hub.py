"""Find a checkpoint: a shipped pack, a directory, or a repository of the hub, which is downloaded.

A checkpoint has the layout that diffusers' `save_pretrained` writes: `model_index.json` and a folder per component.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cogvid.config import CONFIGS
from cogvid.media.download import one_line, shown

PACKS = Path(__file__).parents[1] / "packs"
BASENAME = "diffusion_pytorch_model"
COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
CONFIG_FILES = {name: "scheduler_config.json" if name == "scheduler" else "config.json" for name in COMPONENTS}
WEIGHTS = {"transformer": BASENAME, "vae": BASENAME, "text_encoder": "model"}  # basenames of the safetensors
TOKENIZER_FILES = ("spiece.model", "tokenizer_config.json")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def find(
    source: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    components: Iterable[str] = COMPONENTS,
    variant: str | None = None,
) -> Path:
    """Return the directory of a checkpoint; download it first if `source` is a hub id.

    Args:
        source: the name of a shipped pack, a directory, or a hub id such as "zai-org/CogVideoX-5b", tried in this order
            ("./tiny-i2v" is always a directory).
        revision: branch, tag or commit of a hub id.
        local_files_only: read a hub id from the local cache only, without the network.
        components: the components of a hub id to download.
        variant: variant of the weights to download, such as "fp16"; see `component_variants`.

    Raises:
        ValueError: there is no such model, or none in this variant.
        OSError: the hub cannot be reached, or the disk is full.
    """
    name = os.fspath(source)
    if name in packs():
        return PACKS / name
    path = Path(os.path.expanduser(name))  # which leaves the home of an unknown user as it is
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise ValueError(f"model: got {shown(name)}, which is a file, want the directory of a checkpoint")
    if _HUB_ID.fullmatch(name) and isinstance(source, str):
        return _fetch(name, revision, local_files_only, components, variant)
    known = f", whose weights are {CONFIGS[name].repo}," if name in CONFIGS and CONFIGS[name].repo else ""
    raise ValueError(
        f"model: got {shown(name)}{known or ','} want a directory, a shipped pack ({', '.join(packs())}) or a hub id "
        f"such as {CONFIGS['cogvideox-5b-i2v'].repo}"
    )


def packs() -> list[str]:
    """Return the names of the shipped packs."""
    return sorted(path.parent.name for path in PACKS.glob("*/model_index.json"))


def weight_files(names: Collection[str], basename: str, variant: str | None, where: object) -> list[str]:
    """Return the files of a folder that hold the weights of a variant: one file, or an index and its shards, or none.

    The names are those that diffusers and transformers write: `{basename}.fp16.safetensors`, or
    `{basename}.safetensors.index.fp16.json` with `{basename}.fp16-00001-of-00002.safetensors` and so on. Without a
    variant they have no `fp16`.

    Raises:
        ValueError: the folder holds weights, but only in other variants.
    """
    stem, infix = (basename, "") if variant is None else (f"{basename}.{variant}", f".{variant}")
    if (index := f"{basename}.safetensors.index{infix}.json") in names:
        shard = re.compile(re.escape(stem) + r"-\d+-of-\d+\.safetensors")
        return [index, *sorted(filter(shard.fullmatch, names))]
    if (whole := f"{stem}.safetensors") in names:
        return [whole]
    if others := stored_variants(names, basename):
        raise ValueError(f"variant: got {variant!r}, want {' or '.join(map(repr, others))}: {where} has no other")
    return []


def stored_variants(names: Collection[str], basename: str) -> list[str | None]:
    """Return the variants of the weights in a folder, sorted. None stands for files without a variant and is first."""
    plain = f"{basename}.safetensors", f"{basename}.safetensors.index.json"
    pattern = re.compile(
        re.escape(basename) + r"\.(?:(.+?)(?:-\d+-of-\d+)?\.safetensors|safetensors\.index\.(.+)\.json)"
    )
    found = {match[1] or match[2] for name in names if (match := pattern.fullmatch(name))}
    return [*([None] if any(name in names for name in plain) else []), *sorted(found)]


def component_variants(directory: Path, variant: str | None) -> dict[str, str | None]:
    """Return the variant to load of each component's weights.

    As in diffusers' pipelines, a component without the requested variant is loaded from its plain files; a warning
    names it.

    Raises:
        ValueError: no component has the variant.
    """
    folders = {part: os.listdir(directory / part) for part in WEIGHTS if (directory / part).is_dir()}
    chosen = _choose(folders, variant, directory)
    if plain := [part for part, found in chosen.items() if found != variant]:
        warnings.warn(
            f"variant: got {variant!r}, which {', '.join(plain)} of {directory} lack: their plain files are loaded",
            stacklevel=2,
        )
    return chosen


def _choose(folders: Mapping[str, Collection[str]], variant: str | None, where: object) -> dict[str, str | None]:
    """Return the variant to load from each folder: the requested one, or None (plain files) where it is missing."""
    stored = {part: stored_variants(names, WEIGHTS[part]) for part, names in folders.items()}
    if variant is not None and any(stored.values()) and not any(variant in found for found in stored.values()):
        there = sorted({found for part in stored.values() for found in part}, key=str)
        raise ValueError(f"variant: got {variant!r}, want {' or '.join(map(repr, there))}: {where} has no other")
    return {part: variant if variant in found else None for part, found in stored.items()}


def _fetch(
    repo: str, revision: str | None, local_files_only: bool, components: Iterable[str], variant: str | None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    components = list(components)
    weighted = [part for part in components if part in WEIGHTS]
    files = ["model_index.json"]
    for part in components:
        files += [f"{part}/{name}" for name in (TOKENIZER_FILES if part == "tokenizer" else [CONFIG_FILES[part]])]
    any_variant = [f"{part}/{WEIGHTS[part]}*.{end}" for part in weighted for end in ("safetensors", "json")]
    where = repo + (f" at {revision}" if revision else "")
    got = f"model: got {repo!r}" + (f" at {revision!r}" if revision else "")
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    with _in_one_line(got, repo, revision, local_files_only):
        try:
            there = {
                file.filename: (file.file_size or 0) * file.will_download
                for file in snapshot_download(repo, dry_run=True, allow_patterns=files + any_variant, **options)
            }
            folders = {part: [n.partition("/")[2] for n in there if n.startswith(f"{part}/")] for part in weighted}
            chosen = _choose(folders, variant, where)
            files = [name for name in files if name in there]
            for part, names in folders.items():
                found = weight_files(names, WEIGHTS[part], chosen[part], f"{part} of {where}")
                files += [f"{part}/{name}" for name in found]
            if sizes := [there[name] for name in files if there[name]]:
                print(f"fetching {where}: {len(sizes)} files, {sum(sizes) / 1e9:.3f} GB", file=sys.stderr)
        except DryRunError:  # no network, or local_files_only: the files may be in the local cache
            cache = Path(snapshot_download(repo, allow_patterns=files[:1], **options))
            folders = {part: [path.name for path in (cache / part).glob("*")] for part in weighted}
            for part, found in _choose(folders, variant, f"the local cache of {where}").items():
                stem, infix = (WEIGHTS[part], "") if found is None else (f"{WEIGHTS[part]}.{found}", f".{found}")
                files += [f"{part}/{stem}.safetensors", f"{part}/{stem}-*-of-*.safetensors"]
                files += [f"{part}/{WEIGHTS[part]}.safetensors.index{infix}.json"]
        return Path(snapshot_download(repo, allow_patterns=files, **options))


def fetch_file(
    repo: str, patterns: list[str], choose: Callable[[list[str]], list[str]], local_files_only: bool, got: str
) -> Path:
    """Download some files of a repository and return the path of the first of them.

    patterns: of the files to choose from. choose: gets their names and returns those to download, at least one.
    got: begins the errors, which are as for `find`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    with _in_one_line(got, repo, None, local_files_only):
        try:
            found: Any = snapshot_download(
                repo, dry_run=True, allow_patterns=patterns, local_files_only=local_files_only
            )
            there = {file.filename: (file.file_size or 0) * file.will_download for file in found}
            files = choose(list(there))
            if sizes := [there[name] for name in files if there[name]]:
                print(f"fetching {repo}: {len(sizes)} files, {sum(sizes) / 1e9:.3f} GB", file=sys.stderr)
        except DryRunError:  # no network, or local_files_only: the files may be in the local cache
            cache = Path(snapshot_download(repo, allow_patterns=[], local_files_only=local_files_only))
            files = choose([path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()])
        directory = snapshot_download(repo, allow_patterns=files, local_files_only=local_files_only)
        return Path(directory) / files[0]


@contextlib.contextmanager
def _in_one_line(got: str, repo: str, revision: str | None, local_files_only: bool) -> Iterator[None]:
    """Turn the errors of the hub's client into one line each. got: how the line begins."""
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RevisionNotFoundError as error:
        raise ValueError(f"revision: got {revision!r}, want a branch, tag or commit of {repo}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{got}, want a directory or a repository of the hub that you can read") from error
    except LocalEntryNotFoundError as error:
        if local_files_only:
            wanted = "a directory or a repository that is complete in the hub's local cache"
            raise ValueError(f"{got} without network access, want {wanted}") from error
        raise _refusal(got, error, " and no connection to the hub, want a directory or a connection") from error
    except HFValidationError as error:
        raise ValueError(f"{got}, want a valid hub id ({one_line(error)})") from error
    except Exception as error:  # the hub's client also raises errors of its HTTP library
        of_machine = isinstance(error, OSError) and error.errno is not None  # such as a full disk
        if of_machine or (isinstance(error, ValueError) and not isinstance(error, OSError)):
            raise
        reason = f"could not be fetched whole ({one_line(error)})"
        raise _refusal(got, error, f", which {reason}, want another try: what was fetched is kept") from error


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that is behind an error of the hub's client, which may hide it in other errors."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def _refusal(got: str, error: Exception, otherwise: str) -> ValueError | OSError:
    """Return the error to raise for one of the hub's client: by the status of an answer, or `otherwise` without one."""
    status = _status(error)
    if status is None:
        return OSError(got + otherwise)
    if status in (401, 403):
        wanted = "one that you may read: log in, and accept its conditions on its page"
        return ValueError(f"{got}, which the hub does not let you read (status {status}), want {wanted}")
    if status == 404:
        return ValueError(f"{got}, in which the hub does not find a file (status 404), want a whole repository")
    reason = "too many requests" if status == 429 else "a fault of its own" if status >= 500 else "a refusal"
    return OSError(f"{got}, which the hub answers with status {status}, {reason}, want another try later")


def component_directory(source: str | Path, component: str, variant: str | None = None) -> Path:
    """Return the directory of one component. `source` is a checkpoint, as for `find`, or the component's directory."""
    directory = find(source, components=(component,), variant=variant)
    if (directory / component).is_dir():
        return directory / component
    if (directory / CONFIG_FILES[component]).is_file() and not (directory / "model_index.json").is_file():
        return directory
    wanted = f"a directory with a {component}/ or a {CONFIG_FILES[component]} in it"
    raise ValueError(f"model: got {shown(os.fspath(directory))}, want {wanted}")

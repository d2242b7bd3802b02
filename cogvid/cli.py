"""The `cogvid` command: `generate` makes an MP4, `replay` makes it again, `inspect` says what a checkpoint or MP4 is.

Exit status: 0, with the output's path as the last line on stdout; 2 for a mistake of the user and 1 for a failure of
the machine (no memory, no disk), each with one line on stderr; 130 after an interrupt. torch is not imported before
there is something to compute, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import cogvid
from cogvid.run import settings

USER_ERROR, MACHINE_ERROR, INTERRUPTED = 2, 1, 130
_METAVARS = {int: "N", float: "X", str: "NAME"}
MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; an error becomes one line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"cogvid(\.|$)")
        warnings.showwarning = _show_warning
        try:
            arguments = _parser().parse_args(argv)
            arguments.run(arguments)
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED)
        except (ValueError, OSError, ImportError, MemoryError, FloatingPointError) as error:
            machine = isinstance(error, (MemoryError, FloatingPointError))
            machine = machine or (isinstance(error, OSError) and error.errno in MACHINE_ERRNOS)
            return _fail(error, MACHINE_ERROR if machine else USER_ERROR)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return _fail(f"out of memory: {error}", MACHINE_ERROR)
    return 0


def generate(arguments: argparse.Namespace) -> None:
    """Make a video, encode it while it is decoded, and print its path."""
    from cogvid import versions

    versions.check()
    from cogvid.run.generate import DEFAULT_MODELS, prepare, run
    from cogvid.run.load import load_checkpoint
    from cogvid.run.side_files import SideFiles
    from cogvid.weights.checkpoint import read_checkpoint
    from cogvid.weights.files import DTYPES
    from cogvid.weights.placement import Placement, resolve_device, resolve_dtype, resolve_ops

    task = settings.task_of(arguments.image, arguments.video)
    source = arguments.model or DEFAULT_MODELS[task]
    checkpoint = read_checkpoint(
        source, defaults=arguments.defaults, hash_weights=arguments.hash_weights, **_origin(arguments)
    )
    inputs = ("image", "video", "negative_prompt", "seed", "fps", *settings.OPTIONS)
    given = {name: getattr(arguments, name) for name in inputs}
    side = {name: getattr(arguments, name) for name in ("sidecar", "save_trajectory", "save_noise", "noise")}
    files = SideFiles(embed=not arguments.no_embed, **side)
    job = prepare(checkpoint.model, arguments.prompt, arguments.output, files=files, **given)
    if arguments.record_paths and checkpoint.source_kind == "directory":
        job = dataclasses.replace(job, origin={"source": str(checkpoint.directory)})
    if arguments.model is None and task != "text-to-video":
        # With words alone, the tokenizer names those that the model does not know.
        warnings.warn(
            f"model: got none, so {source} is taken, which knows flat circles, squares and triangles and no photos; "
            f"for others name one, such as --model {settings.models_for(task)[0]}",
            stacklevel=1,
        )
    device = resolve_device(arguments.device)
    try:
        bundle, name = resolve_ops(arguments.ops, device)
    except RuntimeError as error:  # kernels that were asked for and are not there
        raise ValueError(error) from error
    dtype = resolve_dtype(arguments.dtype, device, stored=DTYPES[checkpoint.model.dtype])
    pipe = load_checkpoint(checkpoint, Placement(device, dtype, bundle, name), arguments.qk_norm)
    out = run(pipe, job)
    if out.seed is not None:
        print(f"seed {out.seed}", file=sys.stderr)
    print(arguments.output)


def replay(arguments: argparse.Namespace) -> None:
    """Make a video again from its record, say on stderr what is not as in the record, and print the new path."""
    from cogvid import versions

    versions.check()
    from cogvid.run import replay

    names = ("model", "image", "video", "noise", "device", "dtype", "ops", "local_files_only")
    options = {name: getattr(arguments, name) for name in names}
    replay.replay(arguments.path, arguments.output, say=lambda line: print(line, file=sys.stderr), **options)
    print(arguments.output)


def compare(arguments: argparse.Namespace) -> None:
    """Print how far two videos or two trajectories are apart, and in what their records differ; or trace two videos."""
    from cogvid import versions

    versions.check()
    from cogvid.run import compare

    if arguments.trace:
        from cogvid.run.trace import trace

        origin = {"model": arguments.model, "local_files_only": arguments.local_files_only}
        traced = trace(arguments.first, arguments.second, **origin)
        for line in [json.dumps(traced.to_dict())] if arguments.json else traced.lines():
            print(line)
        return
    found = compare.compare(arguments.first, arguments.second)
    if arguments.side_by_side is not None:
        compare.write_side_by_side(arguments.first, arguments.second, arguments.side_by_side)
    for line in [json.dumps(found.to_dict())] if arguments.json else found.table():
        print(line)


def inspect(arguments: argparse.Namespace) -> None:
    """Print what a checkpoint is (the model, its recommended settings, its weights), or the record of an MP4."""
    if os.path.isfile(arguments.checkpoint):
        from cogvid.run.record import read_record, record_rows

        record = read_record(arguments.checkpoint)
        for line in [json.dumps(record)] if arguments.json else [f"{n:<34}{text}" for n, text in record_rows(record)]:
            print(line)
        return
    from cogvid.weights.checkpoint import describe, read_checkpoint

    found = describe(read_checkpoint(arguments.checkpoint, **_origin(arguments)))
    if arguments.json:
        print(json.dumps(found))
        return
    best = found["recommended"]
    rows = [
        ("model", found["model"] + (f" ({found['official']})" if found["official"] else "")),
        ("directory", found["directory"]),
        ("can do", ", ".join(found["tasks"])),
        ("size", f"{best['height']}x{best['width']} pixels, {best['num_frames']} frames at {best['fps']} fps"),
        ("settings", f"{best['num_inference_steps']} steps, guidance {best['guidance_scale']:g}, {best['scheduler']}"),
        ("run in", best["dtype"]),
        *(
            (part, f"{held['parameters'] / 1e6:,.2f} M parameters, {held['bytes'] / 1e6:,.2f} MB of {held['dtype']}")
            for part, held in found["weights"].items()
        ),
    ]
    for name, value in rows:
        print(f"{name:<14}{value}")


def _origin(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("revision", "local_files_only", "variant")}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cogvid", description="CogVideoX: an image and a prompt in, a video out.")
    parser.add_argument("--version", action="version", version=f"cogvid {cogvid.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    make = commands.add_parser("generate", help="make a video", description=generate.__doc__)
    make.set_defaults(run=generate)
    make.add_argument("prompt", metavar="PROMPT", help="what happens in the video")
    make.add_argument("-o", "--output", required=True, metavar="MP4", help="the file to write; it appears whole or not")
    _add_checkpoint_options(make, "--model", help="tiny-i2v with --image, tiny-t2v without")
    make.add_argument("--image", metavar="PATH|URL", help="first frame: a path or an http(s) URL")
    make.add_argument("--video", metavar="PATH", help="a video to start from")
    make.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    make.add_argument(
        "--defaults",
        default="recommended",
        metavar="WHOSE",
        help="of the options that are not given: recommended (by the model's authors) or diffusers",
    )
    for name, option in settings.OPTIONS.items():
        kind = option.metadata["kind"]
        make.add_argument(
            _flag(name), type=kind, default=option.default, metavar=_METAVARS[kind], help=option.metadata["help"]
        )
    make.add_argument("--seed", type=int, metavar="N", help="drawn and printed if not given")
    make.add_argument("--fps", type=int, metavar="N", help="frames per second of the file; the model's if not given")
    make.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; cuda if there is one")
    make.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; the model's if not given")
    make.add_argument("--ops", default="auto", metavar="NAME", help="auto, torch or triton")
    make.add_argument("--qk-norm", default="layer", metavar="NAME", help="of Q and K: layer, or rms (centred weights)")

    _add_record_options(make)
    _add_replay(commands)
    _add_compare(commands)

    look = commands.add_parser("inspect", help="say what a checkpoint or an MP4 is", description=inspect.__doc__)
    look.set_defaults(run=inspect)
    _add_checkpoint_options(look, "checkpoint", help="or an MP4 of cogvid")
    look.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _add_record_options(make: argparse.ArgumentParser) -> None:
    make.add_argument("--hash-weights", action="store_true", help="record a SHA-256 of all weights, which reads them")
    make.add_argument("--no-embed", action="store_true", help="record the image's hash alone, not the image")
    make.add_argument("--record-paths", action="store_true", help="record the absolute path of a --model directory")
    make.add_argument("--sidecar", metavar="JSON", help="a file for the record, seconds and peak memory")
    safetensors = "SAFETENSORS"
    make.add_argument("--save-trajectory", metavar=safetensors, help="a file for latents and predictions of each step")
    make.add_argument("--save-noise", metavar=safetensors, help="a file for all noise that is drawn")
    make.add_argument("--noise", metavar=safetensors, help="draw the noise of a file of --save-noise, not of a seed")


def _add_replay(commands: Any) -> None:
    again = commands.add_parser("replay", help="make a video again from its record", description=replay.__doc__)
    again.set_defaults(run=replay)
    again.add_argument("path", metavar="MP4", help="a video made by cogvid")
    again.add_argument("-o", "--output", required=True, metavar="MP4", help="the file to write")
    again.add_argument("--model", metavar="MODEL", help="where the weights are, if not where the record says")
    again.add_argument("--local-files-only", action="store_true", help="do not use the network")
    again.add_argument("--image", metavar="PATH|URL", help="the image, if the video does not hold it")
    again.add_argument("--video", metavar="PATH", help="the video that it was started from")
    again.add_argument("--noise", metavar="SAFETENSORS", help="the noise that it was made of")
    for name in ("device", "dtype", "ops"):
        again.add_argument(f"--{name}", metavar="NAME", help="in place of the recorded one")


def _add_compare(commands: Any) -> None:
    pair = commands.add_parser("compare", help="two videos, or two trajectories", description=compare.__doc__)
    pair.set_defaults(run=compare)
    pair.add_argument("first", metavar="A", help="an MP4, or a file of --save-trajectory")
    pair.add_argument("second", metavar="B", help="what to compare with it")
    pair.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    pair.add_argument(
        "--trace",
        action="store_true",
        help="of two videos that differ in device, dtype or ops: run both, and name the first module that departs",
    )
    pair.add_argument("--model", metavar="MODEL", help="for --trace, where the weights are, if the record does not say")
    pair.add_argument("--local-files-only", action="store_true", help="for --trace, do not use the network")
    pair.add_argument("--side-by-side", metavar="MP4|PNG", help="a file for A, B and 8 times their difference")


def _add_checkpoint_options(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    parser.add_argument(
        name, help=f"a directory, a hub id, or a shipped model; {help}", metavar=name.strip("-").upper()
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--local-files-only", action="store_true", help="do not use the network")
    parser.add_argument("--variant", metavar="NAME", help="which weights, where there are several sets, such as fp16")


class _Parser(argparse.ArgumentParser):
    """argparse, with its mistakes raised instead of printed over several lines; sub-commands inherit it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_out_of_memory(error: RuntimeError) -> bool:
    # torch's CPU allocator raises a plain RuntimeError, so its words are all there is to go by
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print("cogvid: warning:", _one_line(message), file=sys.stderr)


def _fail(error: BaseException | str, status: int) -> int:
    text = error.strerror or "" if isinstance(error, OSError) and not error.filename else ""
    print("cogvid: error:", _one_line(text or error) or type(error).__name__, file=sys.stderr)
    return status


def _one_line(text: object) -> str:
    return " ".join(str(text).split())

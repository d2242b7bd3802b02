"""The `cogvid` command: `generate` makes an MP4, `plan` says what one would cost, `inspect` says what a checkpoint is.

Exit status: 0, with the output's path as the last line on stdout; 2 for a mistake of the user and 1 for a failure of
the machine (no memory, no disk), each with one line on stderr; 130 after an interrupt. torch is not imported before
there is something to compute, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import cogvid
from cogvid.run import settings

if TYPE_CHECKING:
    from cogvid.run.plan import Plan, Subject
    from cogvid.weights.placement import Placement

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
    from cogvid.run.plan import out_of_memory, refuse_hopeless, survey
    from cogvid.weights.checkpoint import read_checkpoint

    task = settings.task_of(arguments.image, arguments.video)
    source = arguments.model or DEFAULT_MODELS[task]
    origin = {"defaults": arguments.defaults, **_origin(arguments)}
    subject = survey(source, fetch=True, **origin)
    inputs = ("image", "video", "negative_prompt", "seed", "fps", *settings.OPTIONS)
    given = {name: getattr(arguments, name) for name in inputs}
    job = prepare(subject.model, arguments.prompt, arguments.output, **given)
    if arguments.model is None and task != "text-to-video":
        # With words alone, the tokenizer names those that the model does not know.
        warnings.warn(
            f"model: got none, so {source} is taken, which knows flat circles, squares and triangles and no photos; "
            f"for others name one, such as --model {settings.models_for(task)[0]}",
            stacklevel=1,
        )
    placement = _placement(arguments, subject.model.dtype)
    planned = _plan(arguments, subject, placement, num_frames=job.settings.num_frames)
    refuse_hopeless(planned)
    checkpoint = subject.checkpoint
    if checkpoint is None:  # known from its name so far
        checkpoint = read_checkpoint(source, **origin)
        job = prepare(checkpoint.model, arguments.prompt, arguments.output, **given)
    try:
        out = run(load_checkpoint(checkpoint, placement, arguments.qk_norm), job)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise out_of_memory(planned, subject, placement.ops_name, error) from error
    print(f"seed {out.seed}", file=sys.stderr)
    print(arguments.output)


def plan(arguments: argparse.Namespace) -> None:
    """Print what a run would do and cost: nothing is loaded, downloaded or written."""
    from cogvid.media.video import VideoWriter, read_video
    from cogvid.run.generate import DEFAULT_MODELS
    from cogvid.run.inputs import frames_to_use
    from cogvid.run.plan import survey, table

    task = settings.task_of(arguments.image, arguments.video)
    source = arguments.model or DEFAULT_MODELS[task]
    subject = survey(source, defaults=arguments.defaults, **_origin(arguments))
    changed = {}
    if arguments.video is not None:
        changed["num_frames"] = frames_to_use(
            read_video(arguments.video, arguments.num_frames)[0], arguments.num_frames
        )
    with warnings.catch_warnings(record=True) as caught:
        placement = _placement(arguments, subject.model.dtype)
    notes = tuple(str(warning.message) for warning in caught)
    found = _plan(arguments, subject, placement, notes=notes, **changed)
    if arguments.output is not None:
        VideoWriter(arguments.output, found.settings.height, found.settings.width, found.fps)
    if arguments.json:
        print(json.dumps(found.to_dict()))
        return
    for name, value in table(found):
        print(f"{name:<10}{value}")


def _plan(arguments: argparse.Namespace, subject: Subject, placement: Placement, **changed: Any) -> Plan:
    from cogvid.run.machine import look_at
    from cogvid.run.plan import make_plan

    if arguments.seed is not None:
        settings.check_seed(arguments.seed, 1)
    options = {name: getattr(arguments, name) for name in ("fps", *settings.OPTIONS)}
    task = settings.task_of(arguments.image, arguments.video)
    machine = look_at(placement.device)
    ops = placement.ops_name
    return make_plan(subject, task=task, machine=machine, dtype=placement.dtype, ops=ops, **{**options, **changed})


def _placement(arguments: argparse.Namespace, stored: str) -> Placement:
    from cogvid.weights.files import DTYPES
    from cogvid.weights.placement import Placement, resolve_device, resolve_dtype, resolve_ops

    device = resolve_device(arguments.device)
    try:
        bundle, name = resolve_ops(arguments.ops, device)
    except RuntimeError as error:  # kernels that were asked for and are not there
        raise ValueError(error) from error
    return Placement(device, resolve_dtype(arguments.dtype, device, stored=DTYPES[stored]), bundle, name)


def inspect(arguments: argparse.Namespace) -> None:
    """Print what a checkpoint is: the model, its recommended settings, and what its weights hold."""
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
    _add_run_options(make)

    count = commands.add_parser("plan", help="say what a video would cost", description=plan.__doc__)
    count.set_defaults(run=plan)
    count.add_argument("prompt", nargs="?", metavar="PROMPT", help="as for generate; it costs the same whatever it is")
    count.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    count.add_argument("-o", "--output", metavar="MP4", help="as for generate; checked, and not written")
    _add_run_options(count)

    look = commands.add_parser("inspect", help="say what a checkpoint is", description=inspect.__doc__)
    look.set_defaults(run=inspect)
    _add_checkpoint_options(look, "checkpoint", help="what to look at")
    look.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _add_run_options(make: argparse.ArgumentParser) -> None:
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


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError, so its words are all there is to go by
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print("cogvid: warning:", _one_line(message), file=sys.stderr)


def _fail(error: BaseException | str, status: int) -> int:
    text = error.strerror or "" if isinstance(error, OSError) and not error.filename else ""
    print("cogvid: error:", _one_line(text or error) or type(error).__name__, file=sys.stderr)
    return status


def _one_line(text: object) -> str:
    return " ".join(str(text).split())

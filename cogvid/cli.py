"""The `cogvid` command: `generate` makes an MP4, `batch` many, `inspect` says what a checkpoint is.

Exit status: 0, with the output's path as the last line on stdout; 2 for a mistake of the user and 1 for a failure of
the machine (no memory, no disk), each with one line on stderr; 3 if jobs of a batch failed; 128 + n after signal n,
such as 130 after Ctrl-C. torch is not imported before there is something to compute, so that `--help` and a mistyped
option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import secrets
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import cogvid
from cogvid.run import settings
from cogvid.run.signals import StopOnSignals

if TYPE_CHECKING:
    from cogvid.run.saved_run import SavedRun

USER_ERROR, MACHINE_ERROR, JOBS_FAILED = 2, 1, 3
_UNSET = object()
_METAVARS = {int: "N", float: "X", str: "NAME"}
MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; an error becomes one line on stderr."""
    status = 0
    with StopOnSignals() as stop:
        status = _main(sys.argv[1:] if argv is None else list(argv))
    if stop.received is None:
        return status
    with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal to write to
        _fail(stop.received, stop.received.status)
    return stop.received.status


def _main(argv: list[str]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"cogvid(\.|$)")
        warnings.showwarning = _show_warning
        try:
            arguments = _parser().parse_args(argv)
            arguments.given = _given(argv, arguments)
            return arguments.run(arguments) or 0
        except (ValueError, OSError, ImportError, MemoryError, FloatingPointError) as error:
            machine = isinstance(error, (MemoryError, FloatingPointError))
            machine = machine or (isinstance(error, OSError) and error.errno in MACHINE_ERRNOS)
            return _fail(error, MACHINE_ERROR if machine else USER_ERROR)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return _fail(f"out of memory: {error}", MACHINE_ERROR)


def generate(arguments: argparse.Namespace) -> None:
    """Make a video, encode it while it is decoded, and print its path."""
    if arguments.resume is None:
        _check_given(arguments)
    from cogvid import versions

    versions.check()
    from cogvid.run import resume
    from cogvid.run.stages import listen, print_stage

    with contextlib.ExitStack() as stack:
        if arguments.verbose:
            stack.enter_context(listen(print_stage))
        saved = resume.open_saved_run(arguments.checkpoint, arguments.resume, arguments.every)
        if saved is not None:
            stack.enter_context(saved)
            if arguments.resume:
                vars(arguments).update(resume.restore(saved, arguments.given))
                _check_given(arguments)
            if arguments.seed is None:
                arguments.seed = secrets.randbelow(2**32)
        _generate(arguments, saved)


def _generate(arguments: argparse.Namespace, saved: SavedRun | None) -> None:
    from cogvid.run import resume
    from cogvid.run.generate import DEFAULT_MODELS, prepare, run
    from cogvid.run.load import load_checkpoint
    from cogvid.run.stages import stage
    from cogvid.weights.checkpoint import read_checkpoint
    from cogvid.weights.files import DTYPES
    from cogvid.weights.placement import Placement, resolve_device, resolve_dtype, resolve_ops

    task = settings.task_of(arguments.image, arguments.video)
    source = arguments.model or DEFAULT_MODELS[task]
    checkpoint = read_checkpoint(source, defaults=arguments.defaults, **_origin(arguments))
    inputs = ("image", "video", "negative_prompt", "seed", "fps", *settings.OPTIONS)
    given = {name: getattr(arguments, name) for name in inputs}
    job = prepare(checkpoint.model, arguments.prompt, arguments.output, **given)
    if saved is not None:
        resume.keep(saved, vars(arguments), job)
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
    with stage("load"):
        pipe = load_checkpoint(checkpoint, Placement(device, dtype, bundle, name), arguments.qk_norm)
    out = run(pipe, job, saved)
    print(f"seed {out.seed}", file=sys.stderr)
    print(arguments.output)


def _check_given(arguments: argparse.Namespace) -> None:
    if arguments.prompt is None or arguments.output is None:
        raise ValueError("PROMPT, -o/--output: got one or none of them, want both, or the --resume DIR of a saved run")


def batch(arguments: argparse.Namespace) -> int:
    """Make a video of each job in a directory, and print the path of its manifest; options are of all jobs."""
    from cogvid.run import jobs

    sources = {"JOBS": arguments.jobs, "--prompt": arguments.prompt, "--prompt-file": arguments.prompt_file}
    named = [name for name, value in sources.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"{', '.join(sources)}: got {' and '.join(named) or 'none'}, want one of them")
    if arguments.jobs is not None:
        listed = jobs.read_jobs(arguments.jobs)
    else:
        listed = jobs.read_prompts(arguments.prompt_file) if arguments.prompt_file else [{"prompt": arguments.prompt}]
    given = {name: value for name, value in arguments.given.items() if name in jobs.KINDS and name != "prompt"}
    made = jobs.make_jobs(listed, arguments.sweep, given)

    from cogvid.run.batch import run_batch
    from cogvid.run.stages import listen, print_stage

    with listen(print_stage) if arguments.verbose else contextlib.nullcontext():
        failed = run_batch(made, arguments.output, arguments.batch_size)
    print(os.path.join(arguments.output, "manifest.jsonl"))
    if failed:
        places = ", ".join(str(entry["place"]) for entry in failed[:10])
        return _fail(f"jobs: got {len(failed)} of {len(made)} that failed ({places}), want none", JOBS_FAILED)
    return 0


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


def _given(argv: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that the command line names; the others have their defaults."""
    bare = vars(_parser(unset=vars(arguments)).parse_args(argv))
    return {name: value for name, value in bare.items() if value is not _UNSET}


def _parser(unset: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Make the parser. unset: options of `generate` and `batch` that get no default."""
    parser = _Parser(prog="cogvid", description="CogVideoX: an image and a prompt in, a video out.")
    parser.add_argument("--version", action="version", version=f"cogvid {cogvid.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    make = commands.add_parser("generate", help="make a video", description=generate.__doc__)
    make.set_defaults(run=generate)
    make.add_argument("prompt", nargs="?", metavar="PROMPT", help="what happens in the video")
    make.add_argument("-o", "--output", metavar="MP4", help="the file to write; it appears whole or not")
    _add_run_options(make)
    _add_saving_options(make)
    many = commands.add_parser("batch", help="make many videos", description=batch.__doc__)
    many.set_defaults(run=batch)
    _add_batch_options(many)
    _add_run_options(many)
    for each in (make, many):
        each.set_defaults(**dict.fromkeys(unset, _UNSET))

    look = commands.add_parser("inspect", help="say what a checkpoint is", description=inspect.__doc__)
    look.set_defaults(run=inspect)
    _add_checkpoint_options(look, "checkpoint", help="what to look at")
    look.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_options(parser, "--model", help="tiny-i2v with --image, tiny-t2v without")
    parser.add_argument("--image", metavar="PATH|URL", help="first frame: a path or an http(s) URL")
    parser.add_argument("--video", metavar="PATH", help="a video to start from")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument(
        "--defaults",
        default="recommended",
        metavar="WHOSE",
        help="of the options that are not given: recommended (by the model's authors) or diffusers",
    )
    for name, option in settings.OPTIONS.items():
        kind = option.metadata["kind"]
        parser.add_argument(
            _flag(name), type=kind, default=option.default, metavar=_METAVARS[kind], help=option.metadata["help"]
        )
    parser.add_argument("--seed", type=int, metavar="N", help="drawn and printed if not given")
    parser.add_argument("--fps", type=int, metavar="N", help="frames per second of the file; the model's if not given")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; cuda if there is one")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; the model's if not given")
    parser.add_argument("--ops", default="auto", metavar="NAME", help="auto, torch or triton")
    parser.add_argument(
        "--qk-norm", default="layer", metavar="NAME", help="of Q and K: layer, or rms (centred weights)"
    )
    parser.add_argument("--verbose", action="store_true", help="print seconds and memory of each stage")


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="?", metavar="JOBS", help="JSONL: a job a line, with any option of generate")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where the videos and the manifest go")
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt, instead of JOBS")
    parser.add_argument("--prompt-file", metavar="FILE", help="a prompt a line, instead of JOBS")
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="NAME=VALUES",
        help="each job with each of these values, such as seed=1..8 guidance_scale=2,6",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="the most videos to sample at once")


def _add_saving_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="save the run there as it goes, whole or not at all")
    parser.add_argument("--every", type=int, metavar="N", help="steps between two saves; 1 if not given")
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run saved there, and save it there; PROMPT and all options are those it was begun with",
    )


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

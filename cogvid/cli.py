"""The `cogvid` command: `generate` makes an MP4, `inspect` says what a checkpoint is.

Exit status: 0, with the output's path as the last line on stdout; 2 for a mistake of the user and 1 for a failure of
the machine (no memory, no disk) or of the program, each with one line on stderr; 130 after an interrupt. A video that
is written is status 0, even if its path cannot be printed. torch is not imported before there is something to compute,
so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

import cogvid
from cogvid.run import settings

USER_ERROR, MACHINE_ERROR, INTERRUPTED = 2, 1, 130
_METAVARS = {int: "N", float: "X", str: "NAME"}
MACHINE_ERRNOS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE,
    errno.EPIPE, errno.EBADF,
)  # fmt: skip
# What the loader says of a library that there is no memory for (an ImportError), and PyTorch of a tensor.
_NO_MEMORY = ("Cannot allocate memory", "failed to map segment", "cannot allocate", "DefaultCPUAllocator", "overflow")
_LONGEST_LINE = 1000  # characters


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; an error becomes one line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"cogvid(\.|$)")
        warnings.showwarning = _show_warning
        arguments = argparse.Namespace()
        try:
            _prepare_stdio()
            arguments = _parser().parse_args(argv)
            _check_directory()
            arguments.run(arguments)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED)
        except Exception as error:
            if getattr(arguments, "traceback", False):
                traceback.print_exc()
            return _fail(*_judged(error))
    return 0


def generate(arguments: argparse.Namespace) -> None:
    """Make a video, encode it while it is decoded, and print its path."""
    from cogvid import versions

    versions.check()
    from cogvid.run.generate import DEFAULT_MODELS, prepare, run
    from cogvid.run.load import load_checkpoint
    from cogvid.weights.checkpoint import read_checkpoint
    from cogvid.weights.files import DTYPES
    from cogvid.weights.placement import Placement, resolve_device, resolve_dtype, resolve_ops

    task = settings.task_of(arguments.image, arguments.video)
    source = arguments.model or DEFAULT_MODELS[task]
    checkpoint = read_checkpoint(source, defaults=arguments.defaults, **_origin(arguments))
    inputs = ("image", "video", "negative_prompt", "seed", "fps", *settings.OPTIONS)
    given = {name: getattr(arguments, name) for name in inputs}
    given["negative_prompt"] = _as_text(arguments.negative_prompt)
    job = prepare(checkpoint.model, _as_text(arguments.prompt), arguments.output, **given)
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
    _say(f"seed {out.seed}", sys.stderr)
    _say(arguments.output, sys.stdout)


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

    look = commands.add_parser("inspect", help="say what a checkpoint is", description=inspect.__doc__)
    look.set_defaults(run=inspect)
    _add_checkpoint_options(look, "checkpoint", help="what to look at")
    look.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


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
        self.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from"
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _as_text(argument: str) -> str:
    """Read an argument that the locale's encoding could not as UTF-8, such as any in the C locale beyond ASCII."""
    with contextlib.suppress(UnicodeEncodeError):
        return argument.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return argument


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _judged(error: Exception) -> tuple[BaseException | str, int]:
    """Return what to say of an error, and the exit status."""
    # torch's CPU allocator raises a plain RuntimeError, so its words are all there is to go by.
    no_memory = isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in _NO_MEMORY)
    if no_memory or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {error}" if str(error) else "out of memory", MACHINE_ERROR
    if isinstance(error, FloatingPointError) or (isinstance(error, OSError) and error.errno in MACHINE_ERRNOS):
        return error, MACHINE_ERROR
    if isinstance(error, (ValueError, OSError, ImportError)):
        return error, USER_ERROR
    said = f"unexpected {type(error).__name__}: {error} (--traceback shows where it comes from)"
    return said, MACHINE_ERROR


def _prepare_stdio() -> None:
    """Make stdin, stdout and stderr safe to use, whatever the caller made of them.

    A stream that is closed is opened on /dev/null: else the next file that is opened, the video, would take its number
    and get what libraries print. What the encoding of a stream does not have is written with backslashes.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it stays open
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("working directory: got one that was removed, want one that exists") from None


def _say(line: str, stream: TextIO, end: str = "\n") -> None:
    """Print a line if it can be printed: a pipe may be closed, or a disk full."""
    try:
        print(line, file=stream, end=end, flush=True)
    except OSError:
        # What is left in the buffer would fail again when Python ends, and make the exit status 120.
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"cogvid: warning: {_one_line(message)}", sys.stderr)


def _fail(error: BaseException | str, status: int) -> int:
    text = error.strerror or "" if isinstance(error, OSError) and not error.filename else ""
    _say("", sys.stdout, end="")  # what is left there
    _say(f"cogvid: error: {_one_line(text or error) or type(error).__name__}", sys.stderr)
    return status


def _one_line(text: object) -> str:
    """Return a message as one line that is not too long, without the secrets of URLs in it."""
    from cogvid.media.download import one_line

    return one_line(text, _LONGEST_LINE) if str(text) else ""

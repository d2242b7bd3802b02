"""The arguments of the `cogvid` command: each command's options, and their help."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import cogvid
from cogvid.options import Options
from cogvid.run import settings
from cogvid.run.enhance import DEFAULT_LLM, KEY
from cogvid.ui.command import PASSWORD
from cogvid.weights.load_options import LOAD_OPTIONS

UNSET = object()
_LLM = f"language model behind the URL; {DEFAULT_LLM} if not given. Its key is in the environment: {KEY}"
_METAVARS = {int: "N", float: "X", str: "NAME"}


def make_parser(
    runs: Mapping[str, Callable[[argparse.Namespace], int | None]], unset: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """Make the parser.

    Args:
        runs: what runs each command; the docstring is its description.
        unset: options of `generate` and `batch` that get UNSET for a default.
    """
    parser = _Parser(prog="cogvid", description="CogVideoX: an image and a prompt in, a video out.")
    parser.add_argument("--version", action="version", version=f"cogvid {cogvid.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    make = commands.add_parser("generate", help="make a video")
    make.add_argument("prompt", nargs="?", type=_as_text, metavar="PROMPT", help="what happens in the video")
    make.add_argument("-o", "--output", metavar="MP4", help="file to write, completely or not at all")
    _add_run_options(make)
    _add_saving_options(make)
    _add_record_options(make)
    _add_enhance_options(make)
    many = commands.add_parser("batch", help="make many videos")
    _add_batch_options(many)
    _add_run_options(many)
    count = commands.add_parser("plan", help="say what a video would cost")
    count.add_argument("prompt", nargs="?", metavar="PROMPT", help="as for generate; it costs the same whatever it is")
    count.add_argument("--json", action="store_true", help="print one JSON object instead of a table, legal or not")
    count.add_argument("-o", "--output", metavar="MP4", help="as for generate; checked, and not written")
    count.add_argument("--devices", type=int, metavar="N", help="what each of N devices would do and send")
    count.add_argument("--per-node", type=int, metavar="N", help="devices of a node; all of them if not given")
    _add_run_options(count)
    _add_replay(commands)
    _add_compare(commands)
    _add_enhance(commands)
    _add_report(commands)
    _add_ui(commands)

    look = commands.add_parser("inspect", help="say what a checkpoint or an MP4 is")
    _add_checkpoint_options(look, "checkpoint", help="or an MP4 of cogvid")
    look.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    for name, command in commands.choices.items():
        command.set_defaults(run=runs[name])
        command.description = runs[name].__doc__
    for each in (make, many):
        each.set_defaults(**dict.fromkeys(unset, UNSET))
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_options(parser, "--model", help="by default tiny-i2v with --image, else tiny-t2v")
    parser.add_argument("--image", metavar="PATH|URL", help="first frame: a path or an http(s) URL")
    parser.add_argument("--last-image", metavar="PATH|URL", help="last frame, for models that were trained for it")
    parser.add_argument("--video", metavar="PATH", help="a video to start from")
    parser.add_argument("--mask", metavar="PATH", help="of --video: a picture or video, white where it is made anew")
    parser.add_argument("--control-video", metavar="PATH", help="for Fun-Control models: poses, edges or depths")
    parser.add_argument("--video-start", type=float, metavar="SECONDS", help="the time of its first frame that is used")
    parser.add_argument("--video-fps", type=float, metavar="X", help="frames a second that are used; all if not given")
    parser.add_argument("--negative-prompt", type=_as_text, default="", metavar="TEXT", help="what to steer away from")
    _add_defaults(parser)
    _add_options(parser, {**settings.OPTIONS, **LOAD_OPTIONS})
    parser.add_argument("--seed", type=int, metavar="N", help="drawn and printed if not given")
    parser.add_argument("--fps", type=int, metavar="N", help="frames per second of the file; the model's if not given")
    parser.add_argument("--verbose", action="store_true", help="print seconds and memory of each stage")


def _add_options(parser: argparse.ArgumentParser, options: Options) -> None:
    for name, option in options.items():
        kind, how = option.metadata["kind"], {"default": option.default, "help": option.metadata["help"]}
        if kind is bool:
            parser.add_argument(_flag(name), action="store_true", **how)
        elif kind is list:
            parser.add_argument(_flag(name), action=_Append, metavar=option.metadata["many"], **how)
        else:
            parser.add_argument(_flag(name), type=kind, metavar=_METAVARS[kind], **how)


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="?", metavar="JOBS", help="JSONL: a job a line, with any option of generate")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where the videos and the manifest go")
    parser.add_argument("--prompt", type=_as_text, metavar="TEXT", help="the prompt, instead of JOBS")
    parser.add_argument("--prompt-file", metavar="FILE", help="a prompt a line, instead of JOBS")
    parser.add_argument(
        "--sweep",
        nargs="+",
        type=_as_text,
        default=[],
        metavar="NAME=VALUES",
        help="each job with each of these values, such as seed=1..8 guidance_scale=2,6",
    )
    parser.add_argument("--enhance", metavar="URL", help="not of a batch: a job's prompt would change from run to run")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="the most videos to sample at once")
    parser.add_argument(
        "--ray", metavar="ADDRESS|local", help="run on a Ray cluster (auto, HOST:PORT, ray://HOST:PORT), or on one here"
    )
    parser.add_argument("--ray-devices", type=int, metavar="N", help="devices for one video; 1 if --parallel says none")


def _add_saving_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="save the run there as it goes, whole or not at all")
    parser.add_argument("--every", type=int, metavar="N", help="steps between two saves; 1 if not given")
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run saved there, and save it there; PROMPT and all options are those it was begun with",
    )


def _add_record_options(make: argparse.ArgumentParser) -> None:
    make.add_argument("--hash-weights", action="store_true", help="record a SHA-256 of all weights, which reads them")
    make.add_argument("--no-embed", action="store_true", help="record the image's hash alone, not the image")
    make.add_argument("--record-paths", action="store_true", help="record the absolute path of a --model directory")
    make.add_argument("--sidecar", metavar="JSON", help="a file for the record, seconds and peak memory")
    safetensors = "SAFETENSORS"
    make.add_argument("--save-trajectory", metavar=safetensors, help="a file for latents and predictions of each step")
    make.add_argument("--save-noise", metavar=safetensors, help="a file for all noise that is drawn")
    make.add_argument("--noise", metavar=safetensors, help="draw the noise of a file of --save-noise, not of a seed")
    make.add_argument(
        "--capture", metavar="DIR", help="write q, k, v of the first, middle and last layer at three such steps there"
    )


def _add_replay(commands: Any) -> None:
    again = commands.add_parser("replay", help="make a video again from its record")
    again.add_argument("path", metavar="MP4", help="a video made by cogvid")
    again.add_argument("-o", "--output", required=True, metavar="MP4", help="the file to write")
    again.add_argument("--model", metavar="MODEL", help="where the weights are, if not where the record says")
    again.add_argument("--local-files-only", action="store_true", help="do not use the network")
    again.add_argument("--image", metavar="PATH|URL", help="the image, if the video does not hold it")
    again.add_argument("--video", metavar="PATH", help="the video that it was started from")
    for name in ("last_image", "mask", "control_video"):
        again.add_argument(_flag(name), metavar="PATH", help="the one that it was made with")
    again.add_argument("--noise", metavar="SAFETENSORS", help="the noise that it was made of")
    again.add_argument("--lora", action="append", metavar="PATH", help="where an adapter is, in the record's order")
    for name in ("device", "dtype", "ops"):
        again.add_argument(f"--{name}", metavar="NAME", help="in place of the recorded one")


def _add_compare(commands: Any) -> None:
    pair = commands.add_parser("compare", help="two videos, or two trajectories")
    pair.add_argument("first", metavar="A", help="an MP4, or a file of --save-trajectory")
    pair.add_argument("second", metavar="B", help="what to compare with it")
    pair.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    pair.add_argument(
        "--trace",
        action="store_true",
        help="of two videos that differ in device, dtype or ops: run both, and name the first module that departs",
    )
    pair.add_argument("--model", metavar="MODEL", help="for --trace, where the weights are, if the record does not say")
    pair.add_argument("--local-files-only", action="store_true", help="do not use the network")
    pair.add_argument(
        "--lpips",
        action="store_true",
        help="LPIPS of each frame too; the first time it downloads the weights of AlexNet, 233 MiB; extra: metrics",
    )
    pair.add_argument("--side-by-side", metavar="MP4|PNG", help="a file for A, B and 8 times their difference")


def _add_report(commands: Any) -> None:
    page = commands.add_parser("report", help="one HTML page of batches and measurements")
    page.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a batch's directory, or a file of the kernels' benchmark (--json, --history), of parity_report.py --json "
        "or of step_cache_curve.py --json; a section each",
    )
    page.add_argument("-o", "--output", required=True, metavar="HTML", help="the file to write, whole or not at all")
    page.add_argument("--link", action="store_true", help="link the videos, relative to HTML; else they are in it")
    page.add_argument(
        "--baseline",
        type=_as_text,
        metavar="NAME=VALUE",
        help="compare videos with those of this value alone, or with none: none. If not given, any two that differ in "
        "one setting are compared",
    )


def _add_enhance_options(make: argparse.ArgumentParser) -> None:
    make.set_defaults(enhanced=None)
    make.add_argument("--enhance", metavar="URL", help="run with the long form of PROMPT, as `cogvid enhance` gives it")
    make.add_argument("--llm", metavar="NAME", help=_LLM)


def _add_enhance(commands: Any) -> None:
    longer = commands.add_parser("enhance", help="print the long form of a prompt, by a language model")
    longer.add_argument("prompt", type=_as_text, metavar="PROMPT", help="the short one; may be empty with --image")
    longer.add_argument("--url", metavar="URL", help="base URL of an OpenAI-compatible server; else OPENAI_BASE_URL's")
    longer.add_argument("--llm", metavar="NAME", help=_LLM)
    longer.add_argument("--image", metavar="PATH|URL", help="first frame, which the language model sees")


def _add_defaults(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--defaults",
        default="recommended",
        metavar="WHOSE",
        help="defaults of the options: recommended (by the model's authors), diffusers, or sat (the authors' code)",
    )


def _add_ui(commands: Any) -> None:
    page = commands.add_parser("ui", help="make, look at and compare videos in a browser")
    page.add_argument("--port", type=int, default=7860, metavar="N", help="7860 if not given; 0 is any that is free")
    page.add_argument(
        "--output-dir", default="outputs", metavar="DIR", help="where the videos go; outputs if not given"
    )
    page.add_argument(
        "--share-on", metavar="HOST", help="listen there, and ask for the password in the environment's " + PASSWORD
    )
    page.add_argument("--enhance", metavar="URL", help="offer the long form of a prompt, as `cogvid enhance` gives it")
    page.add_argument("--llm", metavar="NAME", help=_LLM)
    named = "may be repeated; visitors choose among these and the shipped ones"
    _add_checkpoint_options(page, "--model", help=named, action="append")
    _add_defaults(page)
    _add_options(page, LOAD_OPTIONS)


def _add_checkpoint_options(parser: argparse.ArgumentParser, name: str, help: str, **how: Any) -> None:
    parser.add_argument(
        name, help=f"a directory, a hub id, or a shipped model; {help}", metavar=name.strip("-").upper(), **how
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--local-files-only", action="store_true", help="do not use the network")
    parser.add_argument("--variant", metavar="NAME", help="which weights, where there are several sets, such as fp16")


class _Append(argparse.Action):
    """Add a value to a list, whatever the default is; argparse's own action copies the default."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, value: Any, _option: Any = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), value])


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is raised instead of printed over several lines; sub-commands inherit this."""

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

"""The `cogvid` command: `generate` makes an MP4, `inspect` says what a checkpoint is.

Exit status: 0, with the output's path as the last line on stdout; 2 for a mistake of the user and 1 for a failure of
the machine (no memory, no disk), each with one line on stderr; 130 after an interrupt. torch is not imported before
there is something to compute, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import cogvid

USER_ERROR, MACHINE_ERROR, INTERRUPTED = 2, 1, 130
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
    from tqdm import tqdm

    from cogvid import plan
    from cogvid.pipeline import load

    # All that can be refused is refused before a weight is read, the cheapest first.
    task = plan.task_of(arguments.image, arguments.video)
    source = arguments.model or ("tiny-i2v" if task == "image-to-video" else "tiny-t2v")
    origin = {name: getattr(arguments, name) for name in ("revision", "local_files_only", "variant")}
    model = plan.read_model(source, defaults=arguments.defaults, **origin)
    video = None if arguments.video is None else cogvid.read_video(arguments.video, arguments.num_frames)[0]
    options = {
        "height": arguments.height,
        "width": arguments.width,
        "num_frames": len(video) if video is not None and arguments.num_frames is None else arguments.num_frames,
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "use_dynamic_cfg": arguments.dynamic_cfg,
        "scheduler": arguments.scheduler,
        "strength": arguments.strength,
        "resize": arguments.resize,
        "image_latent_scale": arguments.image_latent_scale,
    }
    settings = plan.settle(model, task=task, **options)
    if arguments.seed is not None:
        plan.check_seed(arguments.seed, 1)
    target = {
        "path": arguments.output,
        "height": settings.height,
        "width": settings.width,
        "fps": model.fps if arguments.fps is None else arguments.fps,
    }
    cogvid.VideoWriter(**target)
    _try_writing(arguments.output)
    image = None if arguments.image is None else cogvid.load_image(arguments.image)
    if arguments.model is None and task != "text-to-video":
        # With words alone, the tokenizer names those that the model does not know.
        warnings.warn(
            f"model: got none, so {source} is taken, which knows flat circles, squares and triangles and no photos; "
            f"for others name one, such as --model {plan.models_for(task)[0]}",
            stacklevel=1,
        )
    try:
        run_in = {"device": arguments.device, "dtype": arguments.dtype, "ops": arguments.ops}
        pipe = load(source, **run_in, defaults=arguments.defaults, **origin)
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise
        raise ValueError(error) from error  # a device or kernels that were asked for and are not there

    out = pipe(
        arguments.prompt,
        image=image,
        video=video,
        negative_prompt=arguments.negative_prompt,
        seed=arguments.seed,
        output_type="stream",
        **options,
    )
    print(f"seed {out.seed}", file=sys.stderr)
    with (
        cogvid.VideoWriter(**target, metadata=out.provenance) as writer,
        tqdm(total=settings.num_frames, desc="decode", unit="frame") as bar,
    ):
        for frames in out.frames[0]:
            writer.write(frames)
            bar.update(len(frames))
    print(arguments.output)


def inspect(arguments: argparse.Namespace) -> None:
    """Print what a checkpoint is: the model, its recommended settings, and what its weights hold."""
    from cogvid import plan

    origin = {name: getattr(arguments, name) for name in ("revision", "local_files_only", "variant")}
    found = plan.describe(arguments.checkpoint, **origin)
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
    make.add_argument("--height", type=int, metavar="PIXELS", help="a multiple of 16")
    make.add_argument("--width", type=int, metavar="PIXELS", help="a multiple of 16")
    make.add_argument("--num-frames", type=int, metavar="N", help="8N or 8N + 1")
    make.add_argument("--num-inference-steps", type=int, metavar="N", help="denoising steps, 1 to 1000")
    make.add_argument(
        "--guidance-scale", type=float, metavar="X", help="how much the prompt weighs; off at 1 and below"
    )
    make.add_argument(
        "--dynamic-cfg", action=argparse.BooleanOptionalAction, help="vary the guidance; on with dpm, off with ddim"
    )
    make.add_argument("--scheduler", metavar="NAME", help="dpm or ddim")
    make.add_argument("--strength", type=float, default=0.8, metavar="X", help="with --video: 0 keeps it, 1 ignores it")
    make.add_argument("--resize", default="stretch", metavar="MODE", help="fit the image by stretch, crop or pad")
    make.add_argument(
        "--image-latent-scale",
        default="diffusers",
        metavar="MODE",
        help="of 1.5 image latents, where upstream disagrees with itself: diffusers, none or multiply",
    )
    make.add_argument("--seed", type=int, metavar="N", help="drawn and printed if not given")
    make.add_argument("--fps", type=int, metavar="N", help="frames per second of the file; the model's if not given")
    make.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; cuda if there is one")
    make.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; the model's if not given")
    make.add_argument("--ops", default="auto", metavar="NAME", help="auto, torch or triton")

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

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _try_writing(path: str) -> None:
    """Raise unless a file can be made beside the output: permissions do not tell all, and hours may depend on it."""
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise OSError(error.errno, f"output {path!r} cannot be written: {error.strerror}") from error


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

"""The `cogvid` command: `generate` makes an MP4, `plan` says what one would cost, `batch` makes many.

`replay` makes a video again, `compare` says how far two are apart, `inspect` says what a checkpoint or a video is,
`enhance` makes a long prompt of a short one, `report` shows batches and measurements on a page, `ui` serves a page for
all of this.

Exit status: 0, with the output's path as the last line on stdout; 2 for a mistake of the user and 1 for a failure of
the machine (no memory, no disk) or of the program, each with one line on stderr; 3 if jobs of a batch failed; 128 + n
after signal n, such as 130 after Ctrl-C. A video that is written is status 0, even if its path cannot be printed. torch
is not imported before there is something to compute, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import secrets
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from cogvid.arguments import UNSET, make_parser
from cogvid.run import settings
from cogvid.run.enhance import chat_address
from cogvid.run.errors import USER_ERROR, as_line, is_out_of_memory, judged, line_of
from cogvid.run.signals import Interrupted, StopOnSignals
from cogvid.weights.load_options import LOAD_OPTIONS
from cogvid.weights.parallel_option import world_size

if TYPE_CHECKING:
    from cogvid.config import ModelConfig
    from cogvid.run.generate import Job
    from cogvid.run.jobs import BatchJob
    from cogvid.run.plan import Plan, Subject
    from cogvid.run.saved_run import SavedRun
    from cogvid.weights.placement import Placement

JOBS_FAILED = 3
_PICTURES = ("image", "last_image", "video", "mask", "control_video")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; an error becomes one line on stderr."""
    status, at_last = 0, None
    try:
        if several := world_size() > 1:
            at_last = functools.partial(_end, sys.stderr)
        with StopOnSignals(at_last) as stop:
            status = _main(sys.argv[1:] if argv is None else list(argv), several)
    except (OSError, ValueError) as error:  # there is no descriptor left for the pipe that signals are watched with
        return _fail(*judged(error))
    if stop.received is None:
        return status
    with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal to write to
        (_fail_of_one if several else _fail)(stop.received, stop.received.status)
    return stop.received.status


def _main(argv: list[str], several: bool) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"cogvid(\.|$)")
        warnings.showwarning = _show_warning
        # Where torchao is installed, transformers imports it, which tells of GPU libraries that do not load on a CPU.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        arguments = argparse.Namespace()
        try:
            _prepare_stdio()
            arguments = _parser().parse_args(argv)
            arguments.given = _given(argv, arguments)
            _check_directory()
            status = (_on_ranks(arguments) if several else arguments.run(arguments)) or 0
            sys.stdout.flush()
        except Exception as error:
            if getattr(arguments, "traceback", False):
                traceback.print_exc()
            return _fail_of_one(*judged(error), error) if several else _fail(*judged(error))
    return status


def _on_ranks(arguments: argparse.Namespace) -> int | None:
    """Run a command in one of several processes."""
    from cogvid.run.ranks import run_on_ranks

    return run_on_ranks(arguments, functools.partial(_say_error, sys.stderr))


def generate(arguments: argparse.Namespace) -> None:
    """Make a video, encode it while it is decoded, and print its path."""
    if arguments.resume is None:
        _check_given(arguments)
    from cogvid import versions

    versions.check()
    from cogvid.parallel.share import share
    from cogvid.run import resume
    from cogvid.run.stages import listen, print_stage

    with contextlib.ExitStack() as stack:
        if arguments.verbose:
            stack.enter_context(listen(print_stage))
        saved = resume.open_saved_run(arguments.checkpoint, arguments.resume, arguments.every)
        if saved is not None:
            stack.enter_context(saved)
            if arguments.resume:
                vars(arguments).update(share(lambda: resume.restore(saved, arguments.given)))
                _check_given(arguments)
            if arguments.seed is None:
                arguments.seed = share(lambda: secrets.randbelow(2**32))
        _generate(arguments, saved)


def _generate(arguments: argparse.Namespace, saved: SavedRun | None) -> None:
    from cogvid.parallel.share import share
    from cogvid.run import resume
    from cogvid.run.generate import default_model, run
    from cogvid.run.load import load_checkpoint
    from cogvid.run.memory import memory_lines
    from cogvid.run.plan import out_of_memory, refuse_hopeless, survey
    from cogvid.run.stages import stage
    from cogvid.weights.checkpoint import read_checkpoint

    task = _task(arguments)
    source = arguments.model or default_model(task)
    origin = {"defaults": arguments.defaults, "hash_weights": arguments.hash_weights, **_origin(arguments)}
    subject = survey(source, fetch=True, **origin)
    job = share(lambda: _job(arguments, subject.model, saved))
    if arguments.model is None and task != "text-to-video":
        # For text alone, the tokenizer warns of the words that the model does not know.
        warnings.warn(
            f"model: got none, so {source} is taken, which knows flat circles, squares and triangles and no photos; "
            f"for others name one, such as --model {settings.models_for(task)[0]}",
            stacklevel=1,
        )
    placement = _placement(arguments, subject.model)
    planned = _plan(arguments, subject, placement, num_frames=job.settings.num_frames)
    refuse_hopeless(planned)
    checkpoint = subject.checkpoint
    if checkpoint is None or checkpoint.source_kind == "hub":
        # So far it was known from its name or the local cache; the hub may have a newer one.
        checkpoint = read_checkpoint(source, **origin)
        found = checkpoint.model
        job = share(lambda: _job(arguments, found, saved)) if found != subject.model else job
    if arguments.record_paths and checkpoint.source_kind == "directory":
        job = dataclasses.replace(job, origin={**job.origin, "source": str(checkpoint.directory)})
    if arguments.enhance is not None or arguments.enhanced is not None:
        short = job
        job = share(lambda: _enhanced(arguments, short, saved))
    if saved is not None:
        whole = job
        share(lambda: resume.keep(saved, vars(arguments), whole))
    try:
        with stage("load"):
            pipe = load_checkpoint(checkpoint, placement, arguments.local_files_only)
        out = run(pipe, job, saved)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(planned, subject, placement, error) from error
    for line in memory_lines(pipe) if arguments.verbose else []:
        _say(f"cogvid: {line}", sys.stderr)
    if out.seed is not None:
        _say(f"seed {out.seed}", sys.stderr)
    if out.skipped_steps is not None:
        _say(f"{job.settings.step_cache} skipped work in {len(out.skipped_steps)} steps", sys.stderr)
    _say(arguments.output, sys.stdout)


def _enhanced(arguments: argparse.Namespace, job: Job, saved: SavedRun | None) -> Job:
    from cogvid.run.enhance import enhance_job
    from cogvid.run.stages import stage

    if saved is not None and not saved.is_empty and arguments.enhanced is None:
        raise ValueError(f"enhance: got a URL, want none as in the run saved in {saved.directory}")
    with stage("enhance"):
        job = enhance_job(job, arguments.enhance, arguments.llm, arguments.enhanced)
    _say(f"prompt {job.inputs['prompt']}", sys.stderr)
    return job


def _job(arguments: argparse.Namespace, model: ModelConfig, saved: SavedRun | None) -> Job:
    from cogvid.run.generate import prepare
    from cogvid.run.side_files import SideFiles

    names = (*_PICTURES, "video_start", "video_fps", "negative_prompt", "seed", "fps", *settings.OPTIONS)
    given = {name: getattr(arguments, name) for name in names}
    side = {name: getattr(arguments, name) for name in ("sidecar", "save_trajectory", "save_noise", "noise", "capture")}
    files = SideFiles(embed=not arguments.no_embed, **side)
    whole = ("noise", "save_noise", "save_trajectory", "capture")  # of all steps, which a resumed run does not have
    if saved is not None and any(getattr(files, name) for name in whole):
        raise ValueError(f"checkpoint, resume: got one with {' or '.join(whole)}, want it without them")
    return prepare(model, arguments.prompt, arguments.output, files=files, **given)


def plan(arguments: argparse.Namespace) -> None:
    """Print what a run would do and cost, or why it is not legal: nothing is loaded, downloaded or written."""
    from cogvid.run import plan_devices
    from cogvid.run.plan import table

    try:
        asked = plan_devices.take_asked(arguments)
        subject, placement, found = _planned(arguments)
        shared = plan_devices.plan_devices(subject, placement, found, asked) if asked else None
    except Exception as error:
        reason, status = judged(error)
        if arguments.json and status == USER_ERROR:
            _say(json.dumps({"legal": False, "reasons": [line_of(reason)]}), sys.stdout)
        raise
    whole, lines = found.to_dict(), table(found)
    if shared is not None:
        whole["devices"] = shared.to_dict()
        lines += shared.table()
    for row in [json.dumps(whole)] if arguments.json else [f"{name:<10}{value}" for name, value in lines]:
        _say(row, sys.stdout)


def _planned(arguments: argparse.Namespace) -> tuple[Subject, Placement, Plan]:
    from cogvid.media.video import VideoWriter
    from cogvid.run.generate import default_model
    from cogvid.run.given import count_given
    from cogvid.run.plan import survey

    source = arguments.model or default_model(_task(arguments))
    subject = survey(source, defaults=arguments.defaults, **_origin(arguments))
    chosen = {"start": arguments.video_start, "fps": arguments.video_fps}
    num_frames = count_given({name: getattr(arguments, name) for name in _PICTURES}, chosen, arguments.num_frames)
    with warnings.catch_warnings(record=True) as caught:
        placement = _placement(arguments, subject.model)
    notes = tuple(str(warning.message) for warning in caught)
    found = _plan(arguments, subject, placement, notes=notes, num_frames=num_frames)
    if arguments.output is not None:
        VideoWriter(arguments.output, found.settings.height, found.settings.width, found.fps)
    return subject, placement, found


def _plan(arguments: argparse.Namespace, subject: Subject, placement: Placement, **changed: Any) -> Plan:
    from cogvid.run.machine import look_at
    from cogvid.run.plan import make_plan, mode_of
    from cogvid.weights.lora_file import check_loras

    check_loras(placement.lora, subject.model.transformer)
    if arguments.seed is not None:
        settings.check_seed(arguments.seed, 1)
    options = {name: getattr(arguments, name) for name in ("fps", *settings.OPTIONS)}
    task = _task(arguments)
    machine = look_at(placement.device)
    given = {"dtype": placement.dtype, "ops": placement.ops_name, "mode": mode_of(placement), **options, **changed}
    return make_plan(subject, task=task, machine=machine, **given)


def _task(arguments: argparse.Namespace) -> str:
    return settings.task_of(**{name: getattr(arguments, name) for name in _PICTURES})


def _placement(arguments: argparse.Namespace, model: ModelConfig) -> Placement:
    from cogvid.weights.placement import resolve_placement

    place = resolve_placement(**{name: getattr(arguments, name) for name in LOAD_OPTIONS})
    return place(model.dtype, model.follows)


def replay(arguments: argparse.Namespace) -> None:
    """Make a video again from its record, say on stderr what is not as in the record, and print the new path."""
    from cogvid import versions

    versions.check()
    from cogvid.run import replay

    names = ("model", *_PICTURES, "noise", "lora", "device", "dtype", "ops", "local_files_only")
    options = {name: getattr(arguments, name) for name in names}
    replay.replay(arguments.path, arguments.output, say=lambda line: _say(line, sys.stderr), **options)
    _say(arguments.output, sys.stdout)


def enhance(arguments: argparse.Namespace) -> None:
    """Print the long form of a prompt, as the models were trained on, that a language model makes of a short one."""
    from cogvid.run.enhance import DEFAULT_LLM, enhance

    print(enhance(arguments.prompt, arguments.url, llm=arguments.llm or DEFAULT_LLM, image=arguments.image))


def ui(arguments: argparse.Namespace) -> None:
    """Serve a page in which videos are made, looked at and compared, and print its address; Ctrl-C ends it."""
    from cogvid.ui.command import ui

    ui(arguments, lambda line: _say(line, sys.stdout))


def _check_given(arguments: argparse.Namespace) -> None:
    if arguments.prompt is None or arguments.output is None:
        raise ValueError("PROMPT, -o/--output: got one or none of them, want both, or the --resume DIR of a saved run")
    if arguments.enhance is not None:
        chat_address(arguments.enhance)
    elif arguments.llm is not None and arguments.enhanced is None:
        raise ValueError(f"llm: got {arguments.llm!r:.60} without --enhance, want both or neither")


def batch(arguments: argparse.Namespace) -> int:
    """Make a video of each job in a directory, and print the path of its manifest; options are of all jobs."""
    if arguments.ray is None and arguments.ray_devices is not None:
        raise ValueError(f"ray_devices: got {arguments.ray_devices} without --ray, want both or neither")
    from cogvid.parallel.share import share
    from cogvid.run.batch import run_batch
    from cogvid.run.ray_batch import run_batch_on_ray
    from cogvid.run.stages import listen, print_stage

    made = share(lambda: _jobs_of(arguments))
    options = made, arguments.output, arguments.batch_size
    with listen(print_stage) if arguments.verbose else contextlib.nullcontext():
        if arguments.ray is None:
            failed = run_batch(*options)
        else:
            failed = run_batch_on_ray(*options, address=arguments.ray, devices=arguments.ray_devices)
    _say(os.path.join(arguments.output, "manifest.jsonl"), sys.stdout)
    if failed:
        places = ", ".join(str(entry["place"]) for entry in failed[:10])
        return _fail(f"jobs: got {len(failed)} of {len(made)} that failed ({places}), want none", JOBS_FAILED)
    return 0


def _jobs_of(arguments: argparse.Namespace) -> list[BatchJob]:
    from cogvid.run import jobs

    sources = {"JOBS": arguments.jobs, "--prompt": arguments.prompt, "--prompt-file": arguments.prompt_file}
    named = [name for name, value in sources.items() if value is not None]
    if arguments.enhance is not None:
        raise ValueError("enhance: got it for a batch, want the long prompts in JOBS, as `cogvid enhance` prints them")
    if len(named) != 1:
        raise ValueError(f"{', '.join(sources)}: got {' and '.join(named) or 'none'}, want one of them")
    if arguments.jobs is not None:
        listed = jobs.read_jobs(arguments.jobs)
    else:
        listed = jobs.read_prompts(arguments.prompt_file) if arguments.prompt_file else [{"prompt": arguments.prompt}]
    given = {name: value for name, value in arguments.given.items() if name in jobs.KINDS and name != "prompt"}
    return jobs.make_jobs(listed, arguments.sweep, given)


def compare(arguments: argparse.Namespace) -> None:
    """Print how far two videos or two trajectories are apart, and in what their records differ; or trace two videos."""
    from cogvid import versions

    versions.check()
    from cogvid.run import compare

    if arguments.trace:
        from cogvid.run.trace import trace

        if arguments.lpips or arguments.side_by_side is not None:
            name = "lpips" if arguments.lpips else "side_by_side"
            raise ValueError(f"{name}: got it with --trace, which compares no frames, want one of the two")
        origin = {"model": arguments.model, "local_files_only": arguments.local_files_only}
        traced = trace(arguments.first, arguments.second, **origin)
        for line in [json.dumps(traced.to_dict())] if arguments.json else traced.lines():
            _say(line, sys.stdout)
        return
    options = {"lpips": arguments.lpips, "local_files_only": arguments.local_files_only}
    found = compare.compare(arguments.first, arguments.second, **options)
    if arguments.side_by_side is not None:
        compare.write_side_by_side(arguments.first, arguments.second, arguments.side_by_side)
    for line in [json.dumps(found.to_dict())] if arguments.json else found.table():
        _say(line, sys.stdout)


def report(arguments: argparse.Namespace) -> None:
    """Write one HTML page of batches, benchmarks and comparisons, which needs nothing else, and print its path."""
    from cogvid import versions

    versions.check()
    from cogvid.ui.report import write_report

    write_report(arguments.sources, arguments.output, link=arguments.link, baseline=arguments.baseline)
    _say(arguments.output, sys.stdout)


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


def _given(argv: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that the command line names; the others have their defaults."""
    bare = vars(_parser(unset=vars(arguments)).parse_args(argv))
    return {name: value for name, value in bare.items() if value is not UNSET}


def _parser(unset: Iterable[str] = ()) -> argparse.ArgumentParser:
    runs = {"generate": generate, "batch": batch, "plan": plan, "replay": replay, "compare": compare}
    return make_parser({**runs, "enhance": enhance, "report": report, "inspect": inspect, "ui": ui}, unset)


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
    _say(f"cogvid: warning: {as_line(message)}", sys.stderr)


def _fail(error: BaseException | str, status: int) -> int:
    _say("", sys.stdout, end="")  # what is left there
    _say(f"cogvid: error: {line_of(error)}", sys.stderr)
    return status


def _fail_of_one(said: BaseException | str, status: int, error: BaseException | None = None) -> int:
    """Fail as one of several processes, of which one prints its line. error: the cause, if it is not `said`."""
    from cogvid.parallel.watch import judge

    cause = said if isinstance(said, BaseException) else error
    assert cause is not None
    line, status = judge(line_of(said), status, cause)
    if line is not None:
        _say_error(sys.stderr, line)
    return status


def _say_error(stream: TextIO, line: str) -> None:
    _say(f"\ncogvid: error: {line}", stream)  # a bar may be there that has not ended its line


def _end(stream: TextIO, interrupted: Interrupted) -> None:
    """End a process that waits for others and does not come back after a signal."""
    from cogvid.parallel.watch import end

    end(functools.partial(_say_error, stream), str(interrupted), interrupted.status)

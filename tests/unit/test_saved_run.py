"""A run that is cut off, at any moment, goes on where it was and ends in the same bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cogvid
from cogvid.cli import main
from cogvid.run import signals
from cogvid.run.saved_run import SavedRun
from references import picture

ROOT = Path(__file__).parents[2]
PROMPT = "the red circle moves right"
QUICK: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, "num_frames": 9, "progress": False}
LATENT = {**QUICK, "output_type": "latent"}


class Cut(Exception):
    """A run ends here."""


class Drift:
    """A step cache that keeps tensors and numbers: it runs every second step and repeats the change in between."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def run(self, x: Tensor, context: Any, blocks: Any) -> Tensor:
        kept = self.state.setdefault(context.branch, {"calls": 0, "sizes": ()})
        kept["calls"] += 1
        if kept["calls"] % 2:
            kept["change"] = blocks(x) - x
            kept["sizes"] += (float(kept["change"].abs().max()),)
        return x + kept["change"]


def heun(x: Tensor, step: Any, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A sampler whose state has other things than `dpm`'s: a 0-dim tensor, a view, an expanded tensor, plain values."""
    x0 = step.x0(x)
    bias = state["bias"][:1].mean() * state["factor"] + state["level"].float() if state else 0.0
    keep = ((1 - step.alpha_prev) / (1 - step.alpha)).sqrt()
    x = keep * x + (step.alpha_prev.sqrt() - keep * step.alpha.sqrt()) * (x0 + 1e-3 * bias) + 1e-3 * step.noise()
    bias = x0[:, :, ::2].mean((3, 4), keepdim=True).expand(-1, -1, -1, 3, 5)
    return x, {"level": step.alpha, "bias": bias, "factor": 0.1, "notes": [None, True, step.index, "\u00e9"]}


@pytest.fixture(scope="module")
def pipes() -> dict[str, cogvid.Pipeline]:
    return {name: cogvid.load(name, device="cpu", dtype="float32") for name in ("tiny-i2v", "tiny-t2v")}


@pytest.fixture(autouse=True)
def samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cogvid.SAMPLERS, "heun", heun)


def cut_off(pipe: cogvid.Pipeline, directory: Path, after: int, every: int = 1, **options: Any) -> None:
    """Run until the callback of step `after` (from 0), which raises: this step is not saved."""

    def cut(pipe: Any, index: int, timestep: int, tensors: Any) -> None:  # noqa: ARG001
        if index == after:
            raise Cut

    with SavedRun(directory, every) as saved, pytest.raises(Cut):
        pipe(PROMPT, saved_run=saved, **{"callback_on_step_end": cut, **options})


def go_on(pipe: cogvid.Pipeline, directory: Path, **options: Any) -> tuple[Any, list[int]]:
    """Go on with a saved run; return its frames and the steps that it took."""
    steps: list[int] = []
    with SavedRun(directory) as saved:
        out = pipe(PROMPT, saved_run=saved, callback_on_step_end=lambda *given: steps.append(given[1]), **options)
    return out.frames, steps


@pytest.mark.parametrize("sampler", ["dpm", "ddim", "heun"])
@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("tiny-i2v", {"image": picture(64, 64)}),
        ("tiny-t2v", {"use_dynamic_cfg": "cosine", "guidance_scale": 3.0}),
        ("tiny-t2v", {"video": [picture(64, 64, seed=i) for i in range(9)], "strength": 1.0}),
    ],
    ids=["image", "text", "video"],
)
def test_a_run_that_goes_on_ends_in_the_same_bits(
    pipes: dict[str, cogvid.Pipeline], tmp_path: Path, sampler: str, name: str, inputs: dict[str, Any]
) -> None:
    pipe, options = pipes[name], {**LATENT, **inputs, "scheduler": sampler}
    whole = pipe(PROMPT, **options).frames
    for after in (1, 3):
        cut_off(pipe, tmp_path / str(after), after, **options)
        frames, steps = go_on(pipe, tmp_path / str(after), **options)
        assert steps == list(range(after, 4))
        assert torch.equal(frames, whole)
        assert frames.stride() == whole.stride()
    frames, steps = go_on(pipe, tmp_path / "3", **options)
    assert steps == []  # all are done
    assert torch.equal(frames, whole)


def test_several_videos_and_a_step_cache(pipes: dict[str, cogvid.Pipeline], tmp_path: Path) -> None:
    pipe, options = pipes["tiny-t2v"], {**LATENT, "num_inference_steps": 6, "num_videos_per_prompt": 2}
    cache = Drift()
    whole = pipe(PROMPT, step_cache=cache, **options).frames
    cut_off(pipe, tmp_path, 3, step_cache=Drift(), **options)
    resumed = Drift()
    frames, steps = go_on(pipe, tmp_path, step_cache=resumed, **options)
    assert steps == [3, 4, 5]
    assert torch.equal(frames, whole)
    assert resumed.state["both"]["sizes"] == cache.state["both"]["sizes"]
    assert not torch.equal(pipe(PROMPT, **options).frames, whole)  # the cache matters
    with pytest.raises(ValueError, match=r"^step_cache: got None, want '.*Drift' as in the run saved in "):
        go_on(pipe, tmp_path, **options)


def test_what_the_callback_made_is_what_is_saved(pipes: dict[str, cogvid.Pipeline], tmp_path: Path) -> None:
    def halve(at: int | None) -> Any:
        def callback(pipe: Any, index: int, timestep: int, tensors: dict[str, Tensor]) -> Any:  # noqa: ARG001
            if index == at:
                raise Cut
            return {"latents": tensors["latents"] * 0.9}

        return callback

    pipe = pipes["tiny-t2v"]
    whole = pipe(PROMPT, callback_on_step_end=halve(None), **LATENT).frames
    cut_off(pipe, tmp_path, 2, callback_on_step_end=halve(2), **LATENT)
    with SavedRun(tmp_path) as saved:
        assert torch.equal(pipe(PROMPT, saved_run=saved, callback_on_step_end=halve(None), **LATENT).frames, whole)


def test_a_callers_generator_is_put_back(pipes: dict[str, cogvid.Pipeline], tmp_path: Path) -> None:
    pipe, options = pipes["tiny-t2v"], {**LATENT, "seed": None}
    whole = pipe(PROMPT, generator=torch.Generator().manual_seed(5), **options).frames
    cut_off(pipe, tmp_path, 2, generator=torch.Generator().manual_seed(5), **options)
    frames, _ = go_on(pipe, tmp_path, generator=torch.Generator().manual_seed(5), **options)
    assert torch.equal(frames, whole)
    with pytest.raises(ValueError, match=r"^latents: got others than those of the run saved in .*, want the same$"):
        go_on(pipe, tmp_path, generator=torch.Generator().manual_seed(6), **options)


def test_every_few_steps(pipes: dict[str, cogvid.Pipeline], tmp_path: Path) -> None:
    pipe, options = pipes["tiny-t2v"], {**LATENT, "num_inference_steps": 5}
    whole = pipe(PROMPT, **options).frames
    for after, begins_at in ((1, 0), (2, 2), (3, 2)):
        cut_off(pipe, tmp_path / str(after), after, every=2, **options)
        frames, steps = go_on(pipe, tmp_path / str(after), **options)
        assert steps == list(range(begins_at, 5))
        assert torch.equal(frames, whole)


def test_another_run_is_refused(pipes: dict[str, cogvid.Pipeline], tmp_path: Path) -> None:
    image = picture(64, 64)
    cut_off(pipes["tiny-i2v"], tmp_path, 2, image=image, **LATENT)
    saved = rf" as in the run saved in {tmp_path}$"
    for changed, message in (
        ({"guidance_scale": 3.5}, r"guidance_scale: got 3\.5, want 2\.0" + saved),
        ({"seed": 4}, "seed: got 4, want 3" + saved),
        ({"num_inference_steps": 5}, "num_inference_steps: got 5, want 4" + saved),
        ({"image": picture(64, 64, seed=9)}, r"image: got \['\w{64}'\], want \['\w{64}'\]" + saved),
    ):
        with pytest.raises(ValueError, match="^" + message):
            go_on(pipes["tiny-i2v"], tmp_path, **{**LATENT, "image": image, **changed})


def test_another_version_is_warned_of(
    pipes: dict[str, cogvid.Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(pipes["tiny-t2v"], tmp_path, 2, **LATENT)
    monkeypatch.setattr(cogvid, "__version__", "9.9.9")
    with pytest.warns(
        UserWarning, match=r"versions: got .*9\.9\.9.*, want .*; the result will differ in the last bits"
    ):
        go_on(pipes["tiny-t2v"], tmp_path, **LATENT)


def test_what_cannot_be_saved_is_refused(pipes: dict[str, cogvid.Pipeline], tmp_path: Path) -> None:
    def odd(x: Tensor, step: Any, state: Any) -> tuple[Tensor, Any]:  # noqa: ARG001
        return x, {"a": [torch.zeros(1), object()]}

    cogvid.SAMPLERS["odd"] = odd
    try:
        with (
            SavedRun(tmp_path / "run") as saved,
            pytest.raises(ValueError, match=r"\['a'\]\[1\]: got object, want ten"),
        ):
            pipes["tiny-t2v"](PROMPT, saved_run=saved, **{**LATENT, "scheduler": "odd"})
    finally:
        del cogvid.SAMPLERS["odd"]
    assert not (tmp_path / "run").exists()


def test_a_directory_has_one_run_and_one_process(pipes: dict[str, cogvid.Pipeline], tmp_path: Path) -> None:
    with (
        SavedRun(tmp_path / "run"),
        pytest.raises(ValueError, match=r"^checkpoint: got .*run, which another process uses, want a directory of "),
    ):
        SavedRun(tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nothing was saved
    with pytest.raises(ValueError, match=r"^every: got 0, want an integer, 1 or more$"):
        SavedRun(tmp_path / "run", every=0)
    cut_off(pipes["tiny-t2v"], tmp_path, 1, **LATENT)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"state\.safetensors: got a broken file \(.*\), want one that a run saved$"):
        go_on(pipes["tiny-t2v"], tmp_path, **LATENT)


# The command line.

STEPS = ["--num-inference-steps", "5", "--num-frames", "9", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    picture(70, 90).save(tmp_path / "picture.png")
    return [PROMPT, "--image", str(tmp_path / "picture.png"), "--seed", "6", *STEPS]


@pytest.fixture
def whole(tmp_path: Path, arguments: list[str]) -> bytes:
    path = tmp_path / "whole.mp4"
    assert main(["generate", *arguments, "-o", str(path)]) == 0
    return path.read_bytes()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cogvid", "generate", *map(str, arguments)]


def stop_while_denoising(number: int, *arguments: object) -> tuple[int, str, float]:
    """Send a signal after a step; return exit status, the last line and the seconds that it took."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cogvid", "generate", *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # `nohup` ignores it
    )
    assert process.stderr is not None
    seen = ""
    while not re.search(r"denoise:.*\| [1-9]\d*/", seen):
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    begun = time.monotonic()
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    return process.returncode, rest.splitlines()[-1] if rest else "", time.monotonic() - begun


def test_resume_with_the_same_options_or_with_none(
    arguments: list[str], whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, out = tmp_path / "run", tmp_path / "out" / "video.mp4"
    out.parent.mkdir()
    status, line, _ = stop_while_denoising(signal.SIGTERM, *arguments, "-o", out, "--checkpoint", directory)
    assert (status, line) == (143, "cogvid: error: interrupted by SIGTERM")
    assert os.listdir(out.parent) == []
    again = ["generate", *arguments, "-o", str(out)]
    assert main([*again, "--checkpoint", str(directory)]) == 2
    assert "which holds a run, want an empty directory, or --resume" in capsys.readouterr().err
    (tmp_path / "picture.png").unlink()
    assert main(["generate", "--resume", str(directory)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(out)
    assert "from the beginning" not in captured.err
    assert "seed 6" in captured.err
    assert out.read_bytes() == whole
    assert main(["generate", "--resume", str(directory), "--strength", "0.5"]) == 2
    assert "strength: got 0.5, want 0.8 as in the run saved in" in capsys.readouterr().err
    picture(70, 90).save(tmp_path / "picture.png")
    other = tmp_path / "other.mp4"
    assert main(["generate", *arguments, "-o", str(other), "--resume", str(directory)]) == 0
    assert other.read_bytes() == whole
    picture(70, 90, seed=8).save(tmp_path / "picture.png")
    assert main(["generate", *arguments, "-o", str(other), "--resume", str(directory)]) == 2
    assert "image: got others than those of the run saved in" in capsys.readouterr().err


def test_resume_where_nothing_is_saved_begins_and_says_so(
    arguments: list[str], whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, out = tmp_path / "run", tmp_path / "video.mp4"
    assert main(["generate", "--resume", str(directory)]) == 2
    assert not directory.exists()
    capsys.readouterr()
    assert main(["generate", *arguments, "-o", str(out), "--resume", str(directory), "--every", "2"]) == 0
    said = f"cogvid: warning: resume: got {directory}, where no step is saved, so the run starts from the beginning"
    assert said in capsys.readouterr().err.splitlines()
    assert out.read_bytes() == whole
    with SavedRun(directory) as saved:
        kept = saved.inputs()
        assert kept is not None
        assert saved.every == 2
    assert {"prompt": PROMPT, "seed": 6, "num_inference_steps": 5}.items() <= kept.items()


def test_a_seed_that_is_drawn_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [PROMPT, *STEPS, "-o", str(tmp_path / "a.mp4"), "--checkpoint", str(tmp_path / "run")]
    assert main(["generate", *options]) == 0
    first = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "run" / "state.safetensors").unlink()
    assert main(["generate", "--resume", str(tmp_path / "run")]) == 0
    assert "from the beginning" in capsys.readouterr().err
    assert (tmp_path / "a.mp4").read_bytes() == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--every", "2"], "every: got 2 without a directory, want it with --checkpoint or --resume"),
        (["--checkpoint", "a", "--resume", "b"], "checkpoint, resume: got a and b, want one directory"),
        (["--checkpoint", "a", "--every", "0"], "every: got 0, want an integer, 1 or more"),
        (["--checkpoint", "a", "--height", "100"], "height: got 100"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "-o", "a.mp4", *options]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# Killed.

KILLER = """
import os, random, shutil, signal, sys, time
import torch, safetensors.torch, transformers, av, PIL.Image
from transformers import T5EncoderModel
import cogvid.run.generate, cogvid.run.load, cogvid.weights.load
from cogvid.cli import main

def start(arguments):
    if (child := os.fork()) == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            status = main(arguments)
        except BaseException:
            status = 99
        os._exit(status)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

seed, kills, directory, *options = sys.argv[1:]
random.seed(int(seed))
run, out, whole = directory + "/run", directory + "/out", directory + "/whole.mp4"
resume = ["generate", *options, "-o", out + "/video.mp4", "--resume", run]

def finished():
    assert open(out + "/video.mp4", "rb").read() == open(whole, "rb").read(), "other bytes"
    assert os.listdir(out) == ["video.mp4"], os.listdir(out)
    assert sorted(os.listdir(run)) == ["inputs.safetensors", "lock", "state.safetensors"], os.listdir(run)
    shutil.rmtree(run)
    os.unlink(out + "/video.mp4")

begun = time.monotonic()
assert ended(start(["generate", *options, "-o", whole])) == 0
seconds = time.monotonic() - begun
os.mkdir(out)
killed = 0
while killed < int(kills):
    child = start(resume)
    time.sleep(random.uniform(0.1, 0.9) * seconds)
    os.kill(child, signal.SIGKILL)
    status = ended(child)
    assert status in (0, -signal.SIGKILL), status
    killed += status != 0
    assert os.listdir(out) in ([], ["video.mp4"]), os.listdir(out)
    state = run + "/state.safetensors"
    if os.path.exists(state):
        safetensors.torch.load_file(state)  # whole
        print(status, "saved", flush=True)
    if status == 0:
        finished()
assert ended(start(resume)) == 0
finished()
"""


def kill_and_go_on(tmp_path: Path, seed: int, kills: int) -> None:
    """Kill the command so many times at random moments, going on each time; a run that ends has the right bytes.

    They are forks of one process that has imported what they need, so that the moments fall into the work.
    """
    picture(64, 64).save(tmp_path / "picture.png")
    options = [PROMPT, "--image", tmp_path / "picture.png", "--seed", 1, *STEPS, "--num-inference-steps", 8]
    script = [sys.executable, "-c", KILLER, seed, kills, tmp_path, *options]
    done = subprocess.run([*map(str, script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{-signal.SIGKILL} saved" in done.stdout  # some were killed after a save


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, seed=0, kills=6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_killed_at_many_random_moments(tmp_path: Path, seed: int) -> None:
    kill_and_go_on(tmp_path, seed=seed, kills=10)


# Signals.


def test_a_signal_stops_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    """SIGHUP; SIGTERM is above, and Ctrl-C in test_cli.py."""
    (tmp_path / "out").mkdir()
    options = [PROMPT, "--num-inference-steps", 1000, "--num-frames", 9, "-o", tmp_path / "out" / "a.mp4"]
    status, line, seconds = stop_while_denoising(signal.SIGHUP, *options)
    assert (status, line) == (129, "cogvid: error: interrupted by SIGHUP")
    assert seconds < 10
    assert os.listdir(tmp_path / "out") == []


LOSER = """
import contextlib, io, json, os, signal, sys
import cogvid.media.video, cogvid.models.text, cogvid.models.transformer, cogvid.run.manifest, cogvid.run.load
from cogvid.cli import main

class Last:
    def __del__(self):  # what is raised here is dropped
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            pass

def swallow():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            pass
    except BaseException:
        pass

def lossy(real, lose, calls):
    def call(*args, **kwargs):
        found = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            lose()
        return found
    return call

for owner, name, arguments in json.loads(sys.argv[1]):
    module, _, attribute = owner.rpartition(".")
    patched = getattr(sys.modules[module], attribute)
    real = getattr(patched, name)
    for lose in (Last, swallow):
        calls, dropped, said = [], [], io.StringIO()
        sys.unraisablehook = dropped.append
        setattr(patched, name, lossy(real, lose, calls))
        with contextlib.redirect_stderr(said):
            status = main([each.format(lose.__name__) for each in arguments])
        setattr(patched, name, real)
        print(json.dumps([lose.__name__, status, len(calls), len(dropped), said.getvalue().splitlines()[-1]]))
"""

LOST = [  # a function, how often it is called once the signal is lost in its first call, and what is left
    ("cogvid.models.text.TextEncoder", "__call__", 2, []),  # the prompt and the negative one are one stage
    ("cogvid.models.transformer.Transformer", "forward", 1, []),
    ("cogvid.media.video.VideoWriter", "write", 1, []),
    ("cogvid.run.manifest.Manifest", "add", 1, ["0000-seed1.mp4"]),
]


@pytest.mark.slow
def test_a_signal_that_a_library_loses_stops_the_run_all_the_same(tmp_path: Path) -> None:
    """In a `__del__`, and where everything is caught: while a prompt is encoded, in a step, a chunk, between jobs."""
    options = ["--model", "tiny-t2v", "--num-inference-steps", "5", "--num-frames", "17", "--height", "32"]
    cases: list[tuple[str, str, list[str]]] = []
    for owner, name, _, _ in LOST:
        out = f"{tmp_path}/{name}-{{}}"
        made = ["generate", PROMPT, "-o", f"{out}/a.mp4", "--seed", "1"]
        if name == "add":
            made = ["batch", "--prompt", PROMPT, "-o", out, "--sweep", "seed=1..3"]
        cases.append((owner, name, [*made, *options, "--width", "32"]))
        for how in ("Last", "swallow"):
            Path(out.format(how)).mkdir()
    command = [sys.executable, "-c", LOSER, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == 2 * len(LOST), done.stderr
    line = "cogvid: error: interrupted by SIGTERM"
    for (how, *rest), (_, name, calls, left) in zip(found, [each for each in LOST for _ in range(2)], strict=True):
        assert rest == [143, calls, how == "Last", line], (name, how)
        assert [path.name for path in (tmp_path / f"{name}-{how}").glob("*.mp4")] == left, (name, how)


def test_without_a_block_no_signal_is_remembered() -> None:
    signals.stop_if_asked()


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    code = f"""
    import os, signal
    from cogvid.run.signals import StopOnSignals
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopOnSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        open({str(tmp_path / "went on")!r}, "w").close()
    assert stop.received is None
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)
    assert (tmp_path / "went on").exists()


def test_a_second_signal_does_not_wait() -> None:
    """The main thread is in one long call in C, during which Python runs no handler."""
    slow = """
    import hashlib, threading
    from cogvid.run.signals import StopOnSignals
    with StopOnSignals() as stop:
        threading.Timer(0.5, lambda: print("ready", flush=True)).start()  # the call has begun by then
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(slow)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143


@pytest.mark.parametrize(
    ("received", "status"),
    [
        ([(0.0, signal.SIGTERM), (0.05, signal.SIGTERM)], None),  # as `timeout` sends it
        ([(0.0, signal.SIGTERM), (0.05, signal.SIGTERM), (1.0, signal.SIGTERM)], 143),
        ([(0.0, signal.SIGTERM), (0.05, signal.SIGINT)], 130),
        ([(0.0, signal.SIGCHLD), (1.0, signal.SIGCHLD), (2.0, signal.SIGHUP), (3.0, signal.SIGHUP)], 129),
    ],
)
def test_one_signal_sent_twice_is_one(
    monkeypatch: pytest.MonkeyPatch, received: list[tuple[float, int]], status: int | None
) -> None:
    reader, writer = os.pipe()
    os.write(writer, bytes(number for _, number in received))
    os.close(writer)
    times = iter(at for at, number in received if number != signal.SIGCHLD)
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(times))
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    signals._watch(reader)
    assert (ended or [None])[0] == status

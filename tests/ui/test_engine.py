"""The runs of a page, without a browser: one queue, one worker, shipped packs."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from cogvid import cli
from cogvid.run.record import read_record
from cogvid.run.signals import Cancelled, stop_if_asked, stop_when
from cogvid.ui import engine as module
from cogvid.ui.engine import Ask, Engine, Run
from tests.llm_server import LONG as LONG_TEXT
from tests.llm_server import serve_llm

PNG = Path(__file__).parents[2].joinpath("scripts", "demo.png").read_bytes()
QUICK = {"num_inference_steps": 2, "num_frames": 9, "guidance_scale": 1.0}
LONG = {"num_inference_steps": 1000, "num_frames": 9, "guidance_scale": 1.0}
WORDS = "a red circle moves right"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = Engine(tmp_path / "out")
    yield made
    made.close()


def until(said: Callable[[], object]) -> None:
    """Wait until something is true; a busy machine may be slow."""
    end = time.monotonic() + 60
    while not said():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def finished(run: Run) -> Run:
    until(lambda: not run.active)
    return run


def test_a_run_is_that_of_the_command_line(engine: Engine, tmp_path: Path) -> None:
    run = finished(engine.submit(Ask("the red circle moves right", image=PNG, seed=7, options=QUICK), "anna"))
    assert (run.state, run.step, run.steps, run.notes) == ("done", 2, 2, [])
    assert run.name is not None
    picture, out = tmp_path / "picture.png", tmp_path / "out.mp4"
    picture.write_bytes(PNG)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    assert cli.main(["generate", WORDS.replace("a", "the", 1), "--image", str(picture), "--seed=7", *options,
                     "--model=tiny-i2v", "-o", str(out)]) == 0  # fmt: skip
    made = engine.directory / run.name
    assert made.read_bytes() == out.read_bytes()
    assert run.record == json.loads(json.dumps(read_record(made)))
    assert run.preview is not None
    assert Image.open(io.BytesIO(run.preview)).size == (64, 64)

    again = finished(engine.submit(Ask(replay=run.name), "anna"))
    assert again.state == "done", again.notes
    assert again.notes[-1].endswith(f"has the same bytes as '{run.name}'")
    assert again.name is not None
    assert engine.directory.joinpath(again.name).read_bytes() == out.read_bytes()


def test_a_long_run_ends_within_a_step_and_leaves_nothing(engine: Engine) -> None:
    run = engine.submit(Ask(WORDS, options=LONG), "anna")
    until(lambda: run.step >= 2)
    assert run.seconds_left is not None
    assert run.seconds_left > 0
    engine.cancel("anna")
    before = run.step
    assert finished(run).state == "cancelled"
    assert run.step <= before + 1
    assert list(engine.directory.iterdir()) == []


def test_visitors_wait_for_each_other_and_see_their_own(engine: Engine) -> None:
    first = engine.submit(Ask(WORDS, options=LONG), "anna")
    until(lambda: first.state == "denoising")
    second = engine.submit(Ask(WORDS, seed=5, options=QUICK), "bert")
    third = engine.submit(Ask(WORDS, seed=6, options=QUICK), "carl")
    assert [each.ahead for each in (second, third)] == [1, 2]
    assert engine.latest("anna") is first
    assert engine.latest("bert") is second
    assert engine.latest("nobody") is None
    with pytest.raises(ValueError, match="run: got a second one"):
        engine.submit(Ask(WORDS, options=QUICK), "anna")
    engine.cancel("bert")
    assert (second.state, third.ahead) == ("cancelled", 1)
    engine.cancel("nobody")
    engine.cancel("anna")
    assert finished(third).state == "done"
    assert third.record is not None
    assert third.record["seed"] == 6
    assert finished(first).state == "cancelled"
    assert engine.submit(Ask(WORDS, options=QUICK), "anna").ask.seed is not None


def test_the_queue_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING", 1)
    engine.submit(Ask(WORDS, options=LONG), "anna")
    until(lambda: engine.latest("anna").state != "waiting")  # pyright: ignore[reportOptionalMemberAccess]
    engine.submit(Ask(WORDS, options=QUICK), "bert")
    with pytest.raises(ValueError, match="queue: got 1 runs that wait, want fewer than 1"):
        engine.submit(Ask(WORDS, options=QUICK), "carl")


def test_bad_input_is_the_line_of_the_command(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    for ask, arguments in (
        (Ask(WORDS, options={"num_frames": 10}), ["--num-frames", "10"]),
        (Ask(WORDS, options={"scheduler": "euler"}), ["--scheduler", "euler"]),
        (Ask(WORDS, seed=-1), ["--seed=-1"]),
        (Ask(WORDS, model="tiny-i2v"), ["--model", "tiny-i2v"]),
    ):
        with pytest.raises(ValueError, match="got") as raised:
            engine.submit(ask, "anna")
        assert cli.main(["generate", WORDS, *arguments, "-o", str(engine.directory / "x.mp4")]) == 2
        assert capsys.readouterr().err.strip().endswith(str(raised.value))
    assert engine.latest("anna") is None


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.mp4", "no.mp4", "", ".hidden.mp4", "a/b.mp4"])
def test_only_videos_of_the_directory_and_known_models_are_read(engine: Engine, tmp_path: Path, name: str) -> None:
    (tmp_path / "x.mp4").touch()
    (engine.directory / ".hidden.mp4").touch()
    with pytest.raises(ValueError, match="video: got"):
        engine.submit(Ask(replay=name), "anna")
    with pytest.raises(ValueError, match="model: got '/etc', want one of tiny-i2v, tiny-t2v"):
        engine.submit(Ask(WORDS, model="/etc"), "anna")


def test_one_model_is_loaded_and_an_error_of_a_run_is_one_line(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []
    load = module.load_checkpoint

    def counted(checkpoint: module.Checkpoint, *rest: object) -> object:
        assert engine._loaded is None, "the old model is freed first"
        loads.append(checkpoint.source)
        return load(checkpoint, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "load_checkpoint", counted)
    for image in (None, None, PNG):
        assert finished(engine.submit(Ask(WORDS, image=image, options=QUICK), "anna")).state == "done"
    assert loads == ["tiny-t2v", "tiny-i2v"]

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: no memory\nfor you")

    monkeypatch.setattr(module, "run", broken)
    run = finished(engine.submit(Ask(WORDS, options=QUICK), "anna"))
    assert run.state == "failed"
    [line] = run.notes
    assert line.startswith("out of memory: DefaultCPUAllocator: no memory for you; memory: got")
    assert "\n" not in line


@pytest.mark.slow
def test_a_prompt_is_enhanced_where_a_server_was_named(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):  # a proxy could not reach this machine
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="enhance: got it without a server, want the page started with --enhance URL"):
        engine.submit(Ask(WORDS, options=QUICK, enhance=True), "anna")
    with serve_llm() as server:
        with_server = Engine(tmp_path / "out", url=server.base(), llm="a-model")
        run = finished(with_server.submit(Ask(WORDS, options=QUICK, enhance=True), "anna"))
        with_server.close()
    assert run.state == "done", run.notes
    assert run.record is not None
    assert run.record["prompt"] == [LONG_TEXT]
    assert run.record["enhanced"]["prompt"] == WORDS
    assert [each["model"] for each in server.requests] == ["a-model"]


def test_the_plan_is_that_of_the_ask(engine: Engine) -> None:
    small = engine.plan(Ask(WORDS, options=QUICK))
    large = engine.plan(Ask(WORDS, image=b"", options={**QUICK, "num_frames": 17}))
    assert (small.model, small.settings.num_frames) != (large.model, large.settings.num_frames)
    assert small.flops["total"] < large.flops["total"]
    with pytest.raises(ValueError, match="height: got 65"):
        engine.plan(Ask(WORDS, options={"height": 65}))


def test_models_are_named_by_the_owner_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: got"):
        Engine(tmp_path / "out", [str(tmp_path / "nothing")])
    twice = [tmp_path / "a" / "m", tmp_path / "b" / "m"]
    for each in twice:
        each.mkdir(parents=True)
    with pytest.raises(ValueError, match="model: got two that are called m"):
        Engine(tmp_path / "out", list(map(str, twice)))


def test_closing_ends_what_runs(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "out")
    run = engine.submit(Ask(WORDS, options=LONG), "anna")
    waiting = engine.submit(Ask(WORDS, options=QUICK), "bert")
    until(lambda: run.step > 0)
    engine.close()
    assert (run.state, waiting.state) == ("cancelled", "waiting")
    assert not engine._worker.is_alive()


def test_an_event_stops_the_thread_that_asked_for_it() -> None:
    event = threading.Event()
    with stop_when(event):
        stop_if_asked()
        event.set()
        with pytest.raises(Cancelled):
            stop_if_asked()
        other = threading.Thread(target=stop_if_asked)
        other.start()
        other.join()
    stop_if_asked()

"""The page in Chromium, used as a person would."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cogvid import cli
from cogvid.run.record import read_record
from tests.ui.conftest import Seen, playing

pytestmark = pytest.mark.browser
DEMO = Path(__file__).parents[2] / "scripts" / "demo.png"
WORDS = "a red circle moves right"
LATE = 120_000  # milliseconds; a busy machine may be slow
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "out"


@pytest.fixture(scope="module")
def url(browser: Any, directory: Path) -> Iterator[str]:  # noqa: ARG001 - where there is no browser, it is not needed
    """The address of a page that runs."""
    command = [sys.executable, "-m", "cogvid", "ui", "--port", "0", "--output-dir", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.send_signal(signal.SIGTERM)  # SIGINT is ignored where the tests run in the background
        assert server.wait(30) == 128 + signal.SIGTERM


@pytest.fixture(autouse=True)
def _only_the_page_is_asked(seen: Seen) -> Iterator[None]:
    yield
    assert (seen.outside, seen.errors) == ([], [])


@pytest.fixture
def visit(open_page: Open, url: str) -> Open:
    """Return `visit(size="wide", dark=False)`: a new visitor's page, when it is ready."""

    def visit(**options: Any) -> Any:
        page = open_page(url, **options)
        page.set_default_timeout(LATE)
        page.wait_for_selector("#plan .facts")
        page.wait_for_selector("#generate:enabled")
        return page

    return visit


def drop(page: Any, path: Path) -> None:
    """Drop a file on the place for pictures."""
    transfer = page.evaluate_handle(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [base64.b64encode(path.read_bytes()).decode(), path.name],
    )
    page.dispatch_event("#picture .drop", "drop", {"dataTransfer": transfer})


def unfold(page: Any, title: str) -> None:
    page.get_by_role("button", name=title).click()


def fill(page: Any, prompt: str = WORDS, **fields: object) -> None:
    """Fill in the form; fields have the names of the options, or "seed"."""
    page.fill("#prompt textarea", prompt)
    for name, title in (("num_frames", "Size and length"), ("num_inference_steps", "Steps and guidance")):
        if name in fields and not page.locator(f"#option-{name}").is_visible():
            unfold(page, title)
    for name, value in fields.items():
        page.fill(f"#{name if name == 'seed' else f'option-{name}'} :is(input, textarea)", str(value))


def generate(page: Any, **fields: object) -> None:
    fill(page, **fields)
    page.click("#generate")


def seed_shown(page: Any) -> str:
    return page.locator("#result dt:has-text('Seed') + dd").inner_text()


def wait_for_seed(page: Any, seed: int) -> None:
    page.wait_for_selector(f"#result dd:text-is('{seed}')")


QUICK = {"num_inference_steps": 2, "num_frames": 9}
LONG = {"num_inference_steps": 1000, "num_frames": 9}


def test_a_picture_is_dropped_and_becomes_a_video(visit: Open, directory: Path, shoot: Callable[..., None]) -> None:
    page = visit()
    drop(page, DEMO)
    page.wait_for_selector("#picture img")
    assert page.evaluate("document.querySelector('#picture img').naturalWidth") > 0
    generate(page, prompt="the red circle moves right", seed=7)
    wait_for_seed(page, 7)
    assert playing(page, "#result video")
    with page.expect_download() as waiting:
        page.click("text=Download the video")
    record = read_record(waiting.value.path())
    assert (record["seed"], record["source"], len(record["image"])) == (7, "tiny-i2v", 1)
    page.click("summary:text-is('Record')")
    assert '"tiny-i2v"' in page.inner_text("#result pre")
    shoot(page, "made-wide-light")

    page.click("#next")
    wait_for_seed(page, 8)
    page.click("#replay")
    page.wait_for_selector("#result .note:has-text('has the same bytes as')")
    made = sorted(directory.glob("*seed8*.mp4"))
    assert len(made) == 2
    assert made[0].read_bytes() == made[1].read_bytes()


def test_the_cost_is_said_before_and_follows_the_options(visit: Open) -> None:
    page = visit()
    before = page.inner_text("#plan .facts")
    unfold(page, "Size and length")
    page.wait_for_selector("#option-num_frames [placeholder='17']")
    fill(page, num_frames=9)
    page.wait_for_selector("#plan dd:has-text('9 frames')")
    assert page.inner_text("#plan .facts") != before


def test_a_long_run_is_cancelled(visit: Open, directory: Path, shoot: Callable[..., None]) -> None:
    page = visit()
    before = len(list(directory.glob("*.mp4")))
    generate(page, **LONG)
    page.wait_for_selector("#progress p:has-text('left')")
    page.wait_for_selector("#preview img")
    assert page.get_attribute("#progress [role=progressbar]", "aria-valuemax") == "1000"
    shoot(page, "running-wide-light")
    page.click("#cancel")
    page.wait_for_selector("#progress:has-text('Cancelled')", timeout=5000)
    assert len(list(directory.glob("*.mp4"))) == before


def test_a_reload_finds_the_run_again(visit: Open) -> None:
    page = visit()
    generate(page, seed=31, num_inference_steps=300, num_frames=9)
    page.wait_for_selector("#progress p:has-text('left')")
    page.reload()
    page.wait_for_selector("#progress p:has-text('Step')")
    assert page.input_value("#prompt textarea") == ""
    wait_for_seed(page, 31)
    page.reload()
    wait_for_seed(page, 31)
    assert playing(page, "#result video")


def test_two_visitors_do_not_disturb_each_other(visit: Open) -> None:
    anna, bert = visit(), visit(size="narrow")
    generate(anna, seed=41, num_inference_steps=500, num_frames=9)
    anna.wait_for_selector("#progress p:has-text('Step')")
    generate(bert, seed=42, **QUICK)
    bert.wait_for_selector("#progress p:has-text('Waiting')")
    wait_for_seed(anna, 41)
    wait_for_seed(bert, 42)
    assert seed_shown(anna) == "41"


def test_bad_input_is_one_line_and_the_page_goes_on(visit: Open, capsys: pytest.CaptureFixture[str]) -> None:
    page = visit()
    generate(page, seed=51, num_frames=10, num_inference_steps=2)
    line = page.locator("#message [role=alert]")
    line.wait_for()
    assert cli.main(["generate", WORDS, "--num-frames", "10", "-o", "x.mp4"]) == 2
    assert capsys.readouterr().err.strip() == f"cogvid: error: {line.inner_text()}"
    for address, said in (
        ("http://127.0.0.1:1/x.png", "which leads to an address that is not public"),
        ("http://localhost/x.png", "which leads to an address that is not public"),
        ("http://[::ffff:10.0.0.1]/x.png", "which leads to an address that is not public"),
        ("file:///etc/passwd", "want an http or https URL"),
    ):
        page.fill("#address :is(input, textarea)", address)
        page.click("#fetch")
        page.locator("#message [role=alert]", has_text=f"got '{address}'").filter(has_text=said).wait_for()
    page.set_input_files("#picture input", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.locator("#picture [role=alert]", has_text="image: got a file of another type").wait_for()
    generate(page, seed="51", num_frames=9)
    wait_for_seed(page, 51)
    assert page.locator("#message [role=alert]").count() == 0


def test_two_are_compared_in_step(visit: Open, shoot: Callable[..., None]) -> None:
    page = visit()
    for seed in (61, 62):
        generate(page, seed=seed, **QUICK)
        wait_for_seed(page, seed)
    page.get_by_role("tab", name="Gallery").click()
    page.wait_for_selector("#cards .card")
    page.fill("#by-prompt :is(input, textarea)", "red circle")
    page.fill("#by-seed :is(input, textarea)", "61")
    page.wait_for_function("document.querySelectorAll('#cards .card').length === 1")
    page.get_by_role("button", name=re.compile("Compare .*seed 61")).click()
    page.wait_for_selector("#cards .picked")
    page.fill("#by-seed :is(input, textarea)", "62")
    page.get_by_role("button", name=re.compile("Compare .*seed 62")).click()
    page.wait_for_selector("#pair .difference img")
    assert page.evaluate("document.querySelector('#pair .difference img').naturalHeight") > 0
    assert "PSNR" in page.inner_text("#pair .facts")
    page.fill("#by-seed :is(input, textarea)", "")
    page.wait_for_function("document.querySelectorAll('#cards .card').length >= 2")
    shoot(page, "compare-wide-light")
    times = (
        """() => [...document.querySelectorAll("#pair .step video")].map((each) => [each.paused, each.currentTime])"""
    )
    page.evaluate("document.querySelectorAll('#pair .step video')[1].play()")
    page.wait_for_function(f"({times})().every(([paused, time]) => !paused && time > 0.1)")
    page.evaluate("document.querySelectorAll('#pair .step video')[0].pause()")
    page.wait_for_function(f"({times})().every(([paused]) => paused)")
    page.evaluate("document.querySelectorAll('#pair .step video')[1].currentTime = 0.5")
    page.wait_for_function(f"({times})().every(([, time]) => Math.abs(time - 0.5) < 0.05)")
    page.get_by_role("button", name=re.compile("Open .*seed 61")).click()
    wait_for_seed(page, 61)


def test_the_keyboard_is_enough(visit: Open) -> None:
    page = visit()

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("s => !!document.activeElement.closest(s)", selector):
                return
        raise AssertionError(f"no way to {selector}")

    tab_to("#picture")
    tab_to("#prompt")
    page.keyboard.type(WORDS)
    tab_to("#seed")
    page.keyboard.type("71")
    tab_to("#generate")
    page.keyboard.press("Enter")
    tab_to("#cancel")
    wait_for_seed(page, 71)
    page.reload()
    page.wait_for_selector("#plan .facts")
    tab_to("#tabs [data-tab-id=gallery]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#cards .card")
    tab_to("#cards button[data-act=pick]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#cards .picked")


EMPTY = """
import gradio
with gradio.Blocks() as blocks:
    pass
blocks.launch(server_port={port}, quiet=True, footer_links=[], ssr_mode=False)
"""


@pytest.fixture(scope="module")
def empty(browser: Any) -> Iterator[str]:  # noqa: ARG001 - where there is no browser, it is not needed
    """An empty Gradio page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    with subprocess.Popen([sys.executable, "-c", EMPTY.format(port=port)], env=environment) as server:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < end, "it did not start"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_that_an_empty_page_has_not(
    visit: Open, open_page: Open, empty: str, violations: Callable[[Any], set[tuple[str, str]]], dark: bool
) -> None:
    bare = open_page(empty, dark=dark)
    bare.wait_for_selector("gradio-app")
    known = {rule for rule, _ in violations(bare)}
    page = visit(dark=dark)
    generate(page, seed=91, **QUICK)
    wait_for_seed(page, 91)
    page.click("#next")
    wait_for_seed(page, 92)
    unfold(page, "More")
    unfold(page, "Where upstream differs")
    found = violations(page)
    fill(page, num_frames=10)
    page.wait_for_selector("#plan [role=alert]")
    found |= violations(page)
    page.get_by_role("tab", name="Gallery").click()
    page.wait_for_selector("#cards .card")
    for place in range(2):
        page.locator("#cards button[data-act=pick]").nth(place).click()
        page.wait_for_function(f"document.querySelectorAll('#cards .picked').length === {place + 1}")
    page.wait_for_selector("#pair .difference img")
    found |= violations(page)
    assert {(rule, place) for rule, place in found if rule not in known} == set()


@pytest.mark.parametrize("size", ["wide", "narrow"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits(visit: Open, shoot: Callable[..., None], size: str, dark: bool) -> None:
    page = visit(size=size, dark=dark)
    width = page.viewport_size["width"]
    name = f"{size}-{'dark' if dark else 'light'}"

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    drop(page, DEMO)
    page.wait_for_selector("#picture img")
    generate(page, prompt="the red circle moves right", seed=81, num_inference_steps=6)
    wait_for_seed(page, 81)
    page.click("#next")
    wait_for_seed(page, 82)
    page.wait_for_function("document.querySelector('#result video').readyState >= 2")
    fits()
    shoot(page, f"make-{name}")
    for title in ("More", "Where upstream differs"):
        unfold(page, title)
    page.wait_for_timeout(500)
    fits()
    shoot(page, f"options-{name}")
    page.get_by_role("tab", name="Gallery").click()
    page.wait_for_selector("#cards .card")
    page.fill("#by-prompt :is(input, textarea)", "the red")
    page.wait_for_timeout(1500)
    for place in range(2):
        page.locator("#cards button[data-act=pick]").nth(place).click()
        page.wait_for_function(f"document.querySelectorAll('#cards .picked').length === {place + 1}")
    page.wait_for_selector("#pair .difference img")
    page.wait_for_timeout(1000)
    fits()
    shoot(page, f"gallery-{name}")

"""A browser: the system's Chromium without a window, driven by Playwright. Tests that use it are marked `browser`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.ui.reports import sweep_jobs, write_batch

SIZES = {"wide": (1400, 900), "narrow": (400, 800)}  # pixels: a desktop and a phone
LOCAL = ("127.0.0.1", "localhost", "")
# Chromium as root in a container, and without the requests that it makes of its own.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip


@dataclass
class Seen:
    """What happened in the pages of a test. outside: URLs of other hosts that were asked for. errors: of scripts."""

    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, or a skip that says what is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install '.[browser]'")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def open_page(browser: Any, seen: Seen) -> Iterator[Callable[..., Any]]:
    """Return `open_page(url, size="wide", dark=False)`, which opens a URL as a new visitor and returns the page.

    url: http or file. size: a name of `SIZES`. Each visitor has cookies and storage of his own.
    """
    contexts = []

    def watch(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in LOCAL:
            seen.outside.append(request.url)

    def open_page(url: str, size: str = "wide", dark: bool = False, **options: Any) -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", watch)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def shoot(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return `shoot(page, name)`, which keeps a picture of the whole page in the directory of --screenshots, if any."""
    directory = request.config.getoption("--screenshots")

    def shoot(page: Any, name: str) -> None:
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(Path(directory, f"{name}.png")), full_page=True)

    return shoot


@pytest.fixture
def violations() -> Callable[[Any], set[tuple[str, str]]]:
    """Return `violations(page)`: (rule, element) of all that axe-core finds and calls serious or critical."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is missing: the extra browser")

    def violations(page: Any) -> set[tuple[str, str]]:
        found = axe.Axe().run(page).response["violations"]
        heavy = [each for each in found if each["impact"] in ("serious", "critical")]
        return {(each["id"], str(node["target"])) for each in heavy for node in each["nodes"]}

    return violations


def playing(page: Any, selector: str = "video") -> bool:
    """Say whether the first video of a page goes on: whether its time changes within five seconds."""
    return page.evaluate(
        """async selector => {
            const video = document.querySelector(selector);
            const before = video.currentTime;
            video.muted = true;
            await video.play();
            for (let i = 0; i < 100; i++) {
                await new Promise(done => setTimeout(done, 50));
                if (video.currentTime !== before) return true;
            }
            return false;
        }""",
        selector,
    )


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch of 2x3 jobs. It is not to be changed."""
    jobs = sweep_jobs(scheduler=["dpm", "ddim"], guidance_scale=[1.0, 3.0, 6.0])
    return write_batch(tmp_path_factory.mktemp("report") / "batch", jobs)

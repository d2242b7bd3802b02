"""`cogvid report`: what a person can do with the page, in Chromium."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogvid.ui.report import write_report
from tests.ui.reports import (
    FPS,
    HOSTILE,
    curves_file,
    kernels_run,
    read_manifest,
    sweep_jobs,
    write_batch,
    write_lines,
    write_manifest,
)

TIMES = "[...document.querySelectorAll('.grid video')].map(video => video.currentTime)"


@pytest.fixture(scope="module")
def written(batch: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report of the batch, and of one failed job, on disk."""
    here = tmp_path_factory.mktemp("written")
    shutil.copytree(batch, here / "batch")
    entries = read_manifest(here / "batch")
    job = {**entries[0]["job"], "guidance_scale": 900.0}
    error = "guidance_scale: got 900.0, want a smaller one"
    failed = {"place": 6, "status": "failed", "error": error, "seconds": 0.25, "peak_memory": None, "job": job}
    write_manifest(here / "batch", [*entries, {**entries[0], **failed}])
    write_report([here / "batch"], here / "report.html")
    shutil.rmtree(here / "batch")  # it is not needed any more
    return (here / "report.html").as_uri()


def wait(page: Any, condition: str, seconds: float = 20.0) -> None:
    """Wait until an expression is true. Playwright's own way evaluates a string later, which the policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def loaded(page: Any, count: int = 6) -> None:
    wait(
        page, f"[...document.querySelectorAll('.grid video')].filter(video => video.readyState >= 3).length === {count}"
    )


def watch(page: Any, seconds: float) -> list[list[float]]:
    """The times of all videos, every 40 milliseconds."""
    return page.evaluate(
        f"""async () => {{
            const seen = [];
            for (const end = performance.now() + {1000 * seconds}; performance.now() < end;) {{
                seen.push({TIMES});
                await new Promise(done => setTimeout(done, 40));
            }}
            return seen;
        }}"""
    )


def spread(times: list[float]) -> float:
    return max(times) - min(times)


@pytest.mark.browser
def test_six_videos_play_in_step(
    open_page: Callable[..., Any], seen: Any, written: str, shoot: Callable[..., None]
) -> None:
    page = open_page(written)
    loaded(page)
    shoot(page, "report-sweep-wide-light")
    page.get_by_role("button", name="Play").click()
    wait(page, f"Math.min(...{TIMES}) > 0.2")
    times = watch(page, 1.0)
    assert all(spread(each) < 1 / FPS for each in times)
    assert min(times[-1]) > min(times[0]) + 0.3  # they go on
    # One that is put three frames ahead waits for the others, long before the end, where all begin again.
    page.get_by_label("Speed").select_option("0.25")
    page.get_by_label("Time", exact=True).fill("0.1")
    page.evaluate("document.querySelector('.grid video').currentTime += 3 / 8")
    assert spread(page.evaluate(TIMES)) > 1 / FPS
    wait(page, f"(times => Math.max(...times) - Math.min(...times) < 0.05)({TIMES})", 4)
    times = page.evaluate(TIMES)
    assert 0.3 < min(times) <= max(times) < 1.3
    page.get_by_label("Speed").select_option("1")
    page.get_by_role("button", name="Pause").click()
    page.wait_for_timeout(200)
    first, *_, last = watch(page, 0.4)
    assert first == last
    assert spread(last) == 0
    # The end comes, and then the beginning again.
    page.get_by_label("Time", exact=True).fill("1.3")
    page.get_by_role("button", name="Play").click()
    wait(page, f"Math.max(...{TIMES}) < 0.5")
    assert all(spread(each) < 1 / FPS for each in watch(page, 0.5))
    assert (seen.outside, seen.errors) == ([], [])


@pytest.mark.browser
def test_axes_and_baseline_change_the_grid(open_page: Callable[..., Any], seen: Any, written: str) -> None:
    page = open_page(written)
    loaded(page)

    def grid() -> list[list[str]]:
        rows = page.locator(".grid tr").all()
        return [[cell.inner_text().split("\n")[0] for cell in row.locator("th, td").all()] for row in rows]

    def metrics(job: int) -> str:
        return page.locator(".card", has_text=f"job {job} ·").locator(".metrics").inner_text()

    assert grid()[0] == [f"guidance_scale {value}" for value in ("1.0 (baseline)", "3.0", "6.0", "900.0")]
    assert [row[0] for row in grid()[1::2]] == ["scheduler dpm", "scheduler ddim"]
    assert grid()[2][3] == "failed: guidance_scale: got 900.0, want a smaller one"
    assert grid()[4][3] == "no job"
    assert metrics(0) == "the baseline"
    before = metrics(2)
    assert re.fullmatch(r"PSNR [\d.]+ dB, SSIM 0\.\d+, max \d+", before)
    page.get_by_label("Baseline").select_option("guidance_scale = 3.0")
    assert metrics(1) == "the baseline"
    assert metrics(2) not in (before, "the baseline", "")
    row = page.locator(".jobs tbody tr").nth(2)
    assert row.locator("td[data-measure=psnr]").inner_text() in metrics(2)
    page.get_by_label("Baseline").select_option("none")
    assert metrics(1) == metrics(2) == ""
    page.get_by_label("Columns").select_option("scheduler")  # the two change places
    assert grid()[0] == ["scheduler dpm (baseline)", "scheduler ddim"]
    assert page.get_by_label("Rows").locator("option:checked").inner_text() == "guidance_scale"
    page.get_by_label("Rows").select_option("nothing")
    page.get_by_label("guidance_scale", exact=True).select_option("6.0")
    loaded(page, 2)
    assert len(page.locator(".grid td").all()) == 2
    assert "job 2" in page.locator(".grid td").first.inner_text()
    page.get_by_label("guidance_scale", exact=True).select_option("all")
    loaded(page, 6)
    page.get_by_role("button", name="Play").click()
    wait(page, f"Math.min(...{TIMES}) > 0.2")
    assert spread(page.evaluate(TIMES)) < 1 / FPS
    assert (seen.outside, seen.errors) == ([], [])


@pytest.mark.browser
def test_the_table_is_sorted_by_its_headers(open_page: Callable[..., Any], written: str) -> None:
    page = open_page(written)

    def jobs() -> list[str]:
        return [each.inner_text() for each in page.locator(".jobs tbody th").all()]

    def head(name: str) -> Any:
        return page.locator(".jobs thead th", has_text=name)

    assert jobs() == list("0123456")
    head("seconds").get_by_role("button").click()
    assert jobs() == list("6543210")
    assert head("seconds").get_attribute("aria-sort") == "ascending"
    assert head("job").get_attribute("aria-sort") is None
    head("seconds").get_by_role("button").press("Enter")
    assert jobs() == list("0123456")
    head("memory").get_by_role("button").click()
    head("memory").get_by_role("button").click()
    assert jobs() == list("5432106")  # what has none is last, whatever the direction
    head("error").get_by_role("button").click()
    assert jobs()[0] == "6"
    assert "want a smaller one" in page.locator(".jobs tbody tr").first.inner_text()


@pytest.mark.browser
def test_the_keyboard_is_enough(open_page: Callable[..., Any], seen: Any, written: str) -> None:
    page = open_page(written)
    loaded(page)

    def focused(what: str) -> Any:
        return page.evaluate(f"document.activeElement.{what}")

    def tab_to(condition: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if focused(f"matches({json.dumps(condition)})"):
                return
        raise AssertionError(f"no {condition}")

    tab_to(".layout select")
    assert focused("labels[0].textContent") == "Rows"
    page.keyboard.press("ArrowDown")
    assert focused("labels[0].textContent") == "Rows"  # it keeps the focus
    assert page.locator(".grid th").first.inner_text().startswith("scheduler")
    tab_to("button.play")
    page.keyboard.press("Enter")
    wait(page, f"Math.min(...{TIMES}) > 0.1")
    page.keyboard.press("Space")
    assert page.get_by_role("button", name="Play").is_visible()
    tab_to("input.time")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(TIMES) == [pytest.approx(2.5 / FPS)] * 6
    tab_to("button.record")
    panel = page.locator(".panel:popover-open")
    assert panel.count() == 1
    assert "peak memory" in panel.inner_text()
    assert "1,500 MB" in panel.inner_text()
    assert focused("getAttribute('aria-expanded')") == "true"
    page.keyboard.press("Tab")
    assert focused("matches('.panel')")  # so it can be scrolled
    page.keyboard.press("Escape")
    assert panel.count() == 0
    tab_to(".jobs th button")
    page.keyboard.press("Space")
    assert focused("closest('th').getAttribute('aria-sort')") == "descending"
    assert not seen.errors


@pytest.mark.browser
def test_the_record_is_shown_under_the_pointer(open_page: Callable[..., Any], written: str) -> None:
    page = open_page(written)
    panel = page.locator(".panel:popover-open")
    page.get_by_role("button", name="job 2 ·").hover()
    panel.wait_for()
    assert "guidance_scale\n6.0" in panel.inner_text()
    assert "timesteps" in panel.inner_text()
    panel.hover()
    page.wait_for_timeout(300)
    assert panel.count() == 1
    page.mouse.move(1390, 5)
    panel.wait_for(state="detached")
    page.get_by_role("button", name="job 0 ·").click()
    page.mouse.move(1390, 5)
    page.wait_for_timeout(300)
    assert panel.count() == 1  # a click keeps it


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_axe_finds_nothing_serious_and_nothing_overflows(
    open_page: Callable[..., Any],
    violations: Callable[[Any], set[tuple[str, str]]],
    shoot: Callable[..., None],
    written: str,
    tmp_path: Path,
    size: str,
    dark: bool,
) -> None:
    runs = [kernels_run("aaaaaaa", 1.2), kernels_run("bbbbbbb", 1.0)]
    rows = [
        {"module": "VAE", "variant": f"{i} frames", "dtype": "fp32", "error": 10.0**-i, "tolerance": 1e-2}
        for i in range(9)
    ]
    parity = write_lines(tmp_path / "parity.json", {"kind": "parity", "header": {"commit": "abc"}, "rows": rows})
    sources = [write_lines(tmp_path / "history.jsonl", *runs), parity, curves_file(tmp_path / "curves.json")]
    write_report(sources, tmp_path / "charts.html")
    for name, url in (("sweep", written), ("charts", (tmp_path / "charts.html").as_uri())):
        page = open_page(url, size=size, dark=dark)
        if name == "sweep":
            loaded(page)
            page.get_by_role("button", name="job 2 ·").click()
        assert violations(page) == set()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        shoot(page, f"report-{name}-{size}-{'dark' if dark else 'light'}")


@pytest.mark.browser
def test_a_hostile_manifest_runs_no_script(open_page: Callable[..., Any], seen: Any, tmp_path: Path) -> None:
    here = write_batch(tmp_path / "batch", [{"prompt": HOSTILE, "seed": i} for i in range(2)])
    entries = read_manifest(here)
    entries[1] |= {"error": HOSTILE, "status": HOSTILE, "stages": {HOSTILE: HOSTILE}}
    write_manifest(here, entries)
    write_report([here], tmp_path / "report.html")
    page = open_page((tmp_path / "report.html").as_uri())
    loaded(page, 1)
    assert page.evaluate("window.hacked") is None
    assert (seen.outside, seen.errors) == ([], [])
    # And if something were not escaped, the policy of the page would stop it.
    text = (tmp_path / "report.html").read_text().replace("<main>", f"<main>{HOSTILE}")
    (tmp_path / "report.html").write_text(text)
    page = open_page((tmp_path / "report.html").as_uri())
    loaded(page, 1)
    assert page.locator("main > img").count() == 1
    assert page.evaluate("window.hacked") is None


@pytest.mark.browser
def test_linked_videos_and_many_of_them_play(
    open_page: Callable[..., Any], seen: Any, batch: Path, tmp_path: Path
) -> None:
    here = shutil.copytree(batch, tmp_path / "a #1")
    jobs = sweep_jobs(seed=list(range(30)), guidance_scale=[2.0, 6.0])
    entry = read_manifest(here)[0]
    write_manifest(here, [{**entry, "place": place, "job": job} for place, job in enumerate(jobs)])
    write_report([here], tmp_path / "report.html", link=True, baseline="none")
    page = open_page((tmp_path / "report.html").as_uri())
    loaded(page, 48)
    page.get_by_label("Lines").select_option("25 to 30")
    loaded(page, 12)
    assert page.locator(".pool video[src]").count() == 0
    page.get_by_role("button", name="Play").click()
    wait(page, f"Math.min(...{TIMES}) > 0.2")
    assert spread(page.evaluate(TIMES)) < 1 / FPS
    assert (seen.outside, seen.errors) == ([], [])

"""`cogvid report`: what is in the page, what is refused, and, in a browser, what a person can do with it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.cli import main
from cogvid.run.compare import compare
from cogvid.ui import report_charts, report_sweep
from cogvid.ui.report import write_report

HOSTILE = '</script><script>window.hacked = 1</script>"\'><img src=x onerror="window.hacked = 1">'
FRAMES, FPS = 12, 8


def write_batch(directory: Path, jobs: list[dict[str, Any]], **changes: Any) -> Path:
    """Write what `cogvid batch` writes: a video of a moving bar for each job, and the manifest. changes: of entries."""
    directory.mkdir()
    for place, job in enumerate(jobs):
        video = torch.full((FRAMES, 48, 64, 3), 40 + 12 * place, dtype=torch.uint8)
        for frame in range(FRAMES):
            video[frame, :, 5 * frame : 5 * frame + 5] = 255
        record = {"prompt": job.get("prompt", "x"), "seeds": [job.get("seed", 0)], "versions": {"cogvid": "0.1.0"}}
        record |= {"weights": "none", "timesteps": [999, 499]}
        with cogvid.VideoWriter(directory / name_of(place), 48, 64, fps=FPS, metadata=record) as writer:
            writer.write(video)
    entries = [
        {
            "place": place, "output": name_of(place), "status": "done", "seed": job.get("seed", 0), "batch_size": 1,
            "seconds": 10.5 - place, "peak_memory": 1_500_000_000 + place, "stages": {"denoise": 2.5}, "error": None,
            "ended": 1.7e9, "job": job, "job_sha256": "0" * 64, **changes,
        }
        for place, job in enumerate(jobs)
    ]  # fmt: skip
    write_manifest(directory, entries)
    return directory


def name_of(place: int) -> str:
    return f"{place:04d}-seed0.mp4"


def write_manifest(directory: Path, entries: list[dict[str, Any]]) -> None:
    (directory / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def read_manifest(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "manifest.jsonl").read_text().splitlines()]


def sweep_jobs(**values: list[Any]) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = [{"prompt": "a red circle"}]
    for name, each in values.items():
        jobs = [{**job, name: value} for job in jobs for value in each]
    return jobs


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch of 2x3 jobs. It is not to be changed."""
    jobs = sweep_jobs(scheduler=["dpm", "ddim"], guidance_scale=[1.0, 3.0, 6.0])
    return write_batch(tmp_path_factory.mktemp("report") / "batch", jobs)


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text within each kind of tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        self.inside.setdefault(self._open[-1] if self._open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def data(self) -> dict[str, Any]:
        return json.loads(next(text for text in self.inside["script"] if text.startswith('{"')))


@pytest.fixture
def failed(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, check that it is refused in one line, and return the line without its start."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        [line] = capfd.readouterr().err.splitlines()
        return line.removeprefix("cogvid: error: ")

    return run


def report(tmp_path: Path, *arguments: object) -> Page:
    output = tmp_path / "report.html"
    assert main(["report", *map(str, arguments), "-o", str(output)]) == 0
    return Page(output)


def assert_self_contained(page: Page) -> None:
    """Nothing is fetched: no address of a network, and no file beside the page."""
    assert not re.search("https?:", page.text)
    for _, attributes in page.tags:
        for name in ("src", "data-src"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_a_batch_is_one_file_with_all_that_is_known(
    batch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = report(tmp_path, batch)
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert_self_contained(page)
    assert len(page.all("video")) == 6
    data = page.data()
    assert [each["name"] for each in data["settings"]] == ["scheduler", "guidance_scale"]
    assert (data["rows"], data["columns"], data["frame"]) == (0, 1, 1 / FPS)  # three columns, two rows
    assert [job["at"] for job in data["jobs"]] == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    # Each pair that differs in one setting: three of each scheduler, one of each guidance scale.
    assert sorted((a, b) for a, b, *_ in data["pairs"]) == [
        (0, 1), (0, 2), (0, 3), (1, 2), (1, 4), (2, 5), (3, 4), (3, 5), (4, 5),
    ]  # fmt: skip
    found = next(pair for pair in data["pairs"] if pair[:2] == [0, 1])[2:]
    rows = compare(batch / name_of(0), batch / name_of(1)).rows
    assert found[0] == pytest.approx(-10 * torch.tensor([10 ** (-row["psnr"] / 10) for row in rows]).mean().log10())
    assert found[1] == pytest.approx(sum(row["ssim"] for row in rows) / FRAMES)
    assert found[2] == max(row["max_abs"] for row in rows)
    for text in ("10.5", "1,500 MB", "2023-11-14 22:13:20 UTC", "timesteps", "[999, 499]", "seconds of denoise"):
        assert text in page.text
    assert not (set(os.listdir(batch)) - {"manifest.jsonl", *map(name_of, range(6))})  # nothing was made there


def test_videos_can_be_linked(batch: Path, tmp_path: Path) -> None:
    (tmp_path / "a b#c").mkdir()
    moved = shutil.copytree(batch, tmp_path / "a b#c" / "batch")
    page = report(tmp_path, moved, "--link")
    assert [video["data-src"] for video in page.all("video")] == [f"a%20b%23c/batch/{name_of(i)}" for i in range(6)]
    assert len(page.text) < 100_000


@pytest.mark.parametrize(("baseline", "pairs"), [
    ("guidance-scale=3.0", [(0, 1), (1, 2), (3, 4), (4, 5)]),
    ("scheduler=ddim", [(0, 3), (1, 4), (2, 5)]),
    ("none", []),
])  # fmt: skip
def test_a_baseline_can_be_named(batch: Path, tmp_path: Path, baseline: str, pairs: list[tuple[int, int]]) -> None:
    data = report(tmp_path, batch, "--baseline", baseline).data()
    assert sorted((a, b) for a, b, *_ in data["pairs"]) == pairs
    if pairs:
        setting = data["settings"][data["columns"]]
        assert f"{setting['name']}={setting['values'][data['only'][1]]}" == baseline.replace("-", "_")


def test_the_first_axes_are_the_two_settings_with_most_values() -> None:
    def axes(**counts: int) -> tuple[str, str]:
        varying = [report_sweep.Setting(name, list(map(str, range(count)))) for name, count in counts.items()]
        rows, columns = report_sweep._axes(varying, None)
        return varying[rows].name if rows >= 0 else "", varying[columns].name if columns >= 0 else ""

    assert axes(a=2, b=4, c=3) == ("c", "b")
    assert axes(a=2, b=40, c=3) == ("b", "c")  # forty columns do not fit
    assert axes(seed=8, a=2, b=2) == ("b", "a")
    assert axes(seed=8, a=2) == ("seed", "a")
    assert axes(a=3) == ("", "a")
    assert axes() == ("", "")


def test_failed_jobs_missing_videos_and_foreign_videos_are_shown(batch: Path, tmp_path: Path) -> None:
    here = shutil.copytree(batch, tmp_path / "batch")
    entries = read_manifest(here)
    entries[0] |= {"status": "failed", "error": "height: got 100, want a multiple of 16", "peak_memory": None}
    (here / name_of(1)).unlink()
    (here / name_of(2)).write_bytes(b"no video")
    (here / name_of(3)).unlink()
    (here / name_of(3)).symlink_to(batch / name_of(3))  # it leads out of the directory
    with cogvid.VideoWriter(here / name_of(4), 32, 32, fps=FPS) as writer:
        writer.write(torch.zeros(FRAMES, 32, 32, 3, dtype=torch.uint8))
    write_manifest(here, entries)
    page = report(tmp_path, here)
    assert len(page.all("video")) == 2
    text = html.unescape(page.text)
    assert "failed: height: got 100, want a multiple of 16" in text
    for place in (1, 3):
        assert f"missing: {name_of(place)} is not in the directory" in text
    assert "not a video: video: got" in text
    assert "which holds no record of how it was made" in text
    [[a, b, reason]] = page.data()["pairs"]
    assert (a, b) == (4, 5)
    assert "want videos of one size" in reason


def test_equal_videos_and_jobs_that_are_alike(tmp_path: Path) -> None:
    jobs = [{"prompt": "x", "scheduler": name} for name in ("dpm", "dpm", "ddim", "ddim")]
    here = write_batch(tmp_path / "batch", jobs)
    for place in (1, 2):
        shutil.copy(here / name_of(0), here / name_of(place))
    data = report(tmp_path, here).data()
    assert [job["twin"] for job in data["jobs"]] == [0, 1, 0, 1]
    first, second = data["pairs"]
    assert first == [0, 2, None, pytest.approx(1), 0]
    assert second[:2] == [1, 3]
    assert second[4] > 0


def test_a_hostile_manifest_is_text(tmp_path: Path) -> None:
    here = write_batch(tmp_path / "batch", [{"prompt": HOSTILE}, {"prompt": "مرحبا 你好 \ud800 \x00 " + "x" * 5000}])
    entries = read_manifest(here)
    for entry in entries:
        entry["stages"] = {HOSTILE: HOSTILE}
        entry["job"] |= {HOSTILE: entry["place"], "model": HOSTILE}
    entries[1] |= {
        "status": HOSTILE,
        "error": HOSTILE,
        "seconds": float("nan"),
        "peak_memory": "much",
        "seed": [HOSTILE],
    }
    write_manifest(here, entries)
    page = report(tmp_path, here)
    assert_self_contained(page)
    assert not page.all("img")
    assert [tag.get("type") for tag in page.all("script")] == ["application/json", None]
    assert page.data()["settings"][0]["values"][0] == HOSTILE
    policy = next(tag["content"] for tag in page.all("meta") if "http-equiv" in tag) or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "مرحبا 你好" in page.text


@pytest.mark.parametrize("output", ["../secret.mp4", "/etc/passwd", "manifest.jsonl", "a\0.mp4", 7, None])
def test_a_manifest_cannot_bring_other_files_into_the_page(
    batch: Path, tmp_path: Path, failed: Callable[..., str], output: Any
) -> None:
    here = shutil.copytree(batch, tmp_path / "batch")
    shutil.copy(batch / name_of(0), tmp_path / "secret.mp4")
    entries = read_manifest(here)
    entries[0]["output"] = output
    write_manifest(here, entries)
    assert re.fullmatch(
        r"source: got .* with the output .*, want names of MP4s in the directory",
        failed("report", here, "-o", tmp_path / "r.html"),
    )
    assert not (tmp_path / "r.html").exists()


def test_mistakes_are_one_line_and_leave_nothing(
    batch: Path, tmp_path: Path, failed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        said = failed("report", *arguments, "-o", output)
        assert output.read_text() == "before"
        return said

    output = tmp_path / "report.html"
    output.write_text("before")
    (tmp_path / "empty").mkdir()
    assert "which has no manifest.jsonl, want a directory of a batch" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "manifest.jsonl").write_text("")
    assert "which has no jobs" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "manifest.jsonl").write_text('{"place": 1}\n')
    assert "got a broken file" in refused(tmp_path / "empty")
    assert "which is no file or directory" in refused(tmp_path / "nothing.json")
    for text in ("", "no JSON", "[1, 2]", '{"header": {}, "rows": []}', '{"kind": "parity", "rows": 1}', "[" * 100_000):
        (tmp_path / "unknown.json").write_text(text)
        assert "which is none of the known kinds" in refused(batch, tmp_path / "unknown.json", "--baseline", "none")
    for wrong in ("guidance_scale=2", "seed=1", "x", "=", ""):
        assert "want none, or NAME=VALUE of scheduler=dpm|ddim, guidance_scale=1.0|3.0|6.0" in refused(
            batch, "--baseline", wrong
        )
    monkeypatch.setattr(report_sweep, "MOST_PAIRS", 8)
    assert re.match(
        "baseline: got none and 9 pairs of videos to compare, want at most 8, or --baseline", refused(batch)
    )
    monkeypatch.setattr(report_sweep, "MOST_BYTES", 2000)
    assert re.match(r"videos: got 0 MB in .*, want at most 0 MB, or --link", refused(batch, "--baseline", "none"))
    assert "want a file name ending in .html or .htm" in failed("report", batch, "-o", tmp_path / "report.pdf")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "empty", "unknown.json"}


def test_a_page_that_fails_while_it_is_written_leaves_nothing(
    batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_card: object) -> str:
        raise FileNotFoundError("the video went away")

    monkeypatch.setattr(report_sweep.Card, "url", gone)
    with pytest.raises(FileNotFoundError, match="went away"):
        write_report([batch], tmp_path / "report.html", baseline="none")
    assert not list(tmp_path.iterdir())


def kernels_run(commit: str, slow: float) -> dict[str, Any]:
    """A run of the benchmark, as `cogvid_kernels.bench` writes it, with times made up."""
    header = {
        "device": "a GPU",
        "commit": commit,
        "date": "2026-11-21",
        "machine": "a GPU, 1980 MHz",
        "copy_gbs": 3000.0,
    }
    rows = []
    for op, case in (("attention", "B1 N17776 H48"), ("gate_residual", "B1 N17776 D3072")):
        common = {"op": op, "case": case, "dtype": "bf16", "cuda_graph": False}
        unit = "TFLOP/s" if op == "attention" else "GB/s"
        for provider, ms in (
            ("torch", 4.0 * slow),
            ("ours", 2.5 * slow),
            ("FlexAttention compiled", 3.0),
            ("mine:f", 2.2),
        ):
            percent = 180 / ms
            times = {"median_ms": ms, "p20_ms": ms * 0.98, "p80_ms": ms * 1.03, "rate": 7 * percent, "unit": unit}
            shares = {"percent_measured": percent, "percent_data_sheet": percent * 0.8}
            more = {"provider": provider, "own": ":" in provider, "error": 1.2e-3, "tflops": 1.0, "flop_per_byte": 9.0}
            rows.append({**common, **times, **shares, **more})
        rows.append({**common, "provider": "FlashAttention 3", "own": False, "reason": "ModuleNotFoundError: <none>"})
    return {"header": header, "rows": rows}


def write_lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_kernels_are_bars_against_their_limit_and_lines_over_commits(tmp_path: Path) -> None:
    runs = [kernels_run("aaaaaaa", 1.2), kernels_run("bbbbbbb", 1.1), kernels_run("ccccccc", 1.0)]
    other = {**runs[0], "header": {**runs[0]["header"], "device": "another GPU"}}
    source = write_lines(tmp_path / "history.jsonl", runs[0], other, *runs[1:])
    source.write_text(source.read_text() + '{"header": {"cut sh')
    page = report(tmp_path, source)
    assert_self_contained(page)
    assert [bar["width"] for bar in page.all("rect") if bar.get("class") == "bar"][:4] == [
        f"{100 * percent / 127.5:.2f}".rstrip("0").rstrip(".") for percent in (45, 72, 60, 180 / 2.2)
    ]  # the data sheet is at 125 %, and there is room for 2 % beyond
    assert [path["d"] for path in page.all("path") if path.get("class") == "limit"][:4] == ["M78.43 0V20"] * 4
    assert next(path["d"] for path in page.all("path") if path.get("class") == "limit sheet") == "M98.04 0V20"
    assert "not timed: ModuleNotFoundError: &lt;none&gt;" in page.text
    for op in ("attention", "gate_residual"):  # three commits of this device, four providers
        section = page.text[page.text.index(f">{op}, ") :]
        assert re.findall(r"<td class=.number.>([\d.]*)</td>", section[section.index("<caption") :])[:3] == [
            "4.8",
            "4.4",
            "4",
        ]
    assert "another GPU" not in page.text
    single = report(tmp_path, write_lines(tmp_path / "kernels.json", runs[2]))
    assert "<caption" not in single.text


def test_parity_is_a_heat_map_with_its_tolerances(tmp_path: Path) -> None:
    errors = {"a": 1e-5, "b": 0.9e-5, "c": 0.4e-5, "d": 1e-8, "e": 0.0, "f": 1.1e-5}
    rows = [
        {"module": "transformer", "variant": name, "dtype": "fp32", "error": error, "tolerance": 1e-5}
        for name, error in errors.items()
    ]
    rows.append({"module": "transformer", "variant": "a", "dtype": "bf16", "error": 4e-3, "tolerance": 8e-3})
    source = write_lines(tmp_path / "parity.json", {"kind": "parity", "header": {"commit": "abc"}, "rows": rows})
    page = report(tmp_path, source)
    assert_self_contained(page)
    shades = [cell["class"] for cell in page.all("td")]
    wanted = ["heat-7", "heat-6", "heat-7", "", "heat-6", "", "heat-0", "", "heat-0", "", "heat-8", ""]
    assert shades == [f"number {shade}".strip() for shade in wanted]
    assert "1 above the tolerance." in page.text
    assert "4.0e-03 <small>0.5 of 8.0e-03</small>" in page.text


def curves_file(path: Path) -> Path:
    names = {"first-block": (0.05, 0.1, 0.2), "teacache": (0.3, 0.5), "8-bit weights": ("int8", "fp8-storage")}
    rows: list[dict[str, Any]] = [
        {"kind": "none", "name": "none", "work": 1.0, "time": 1.0, "psnr": None, "ssim": None}
    ]
    for i, (kind, values) in enumerate(names.items()):
        for k, value in enumerate(values):
            row = {"kind": kind, "name": f"{kind}={value}", "work": 0.9 - 0.2 * k, "time": 0.92 - 0.2 * k + 0.02 * i}
            rows.append({**row, "psnr": 45.0 - 6 * k - i, "ssim": 0.99 - 0.03 * k, "motion": 1.0})
    return write_lines(path, {"kind": "curves", "header": {"commit": "abc"}, "packs": {"tiny-i2v": rows}})


def test_curves_have_a_point_and_a_row_for_each_run(tmp_path: Path) -> None:
    page = report(tmp_path, curves_file(tmp_path / "curves.json"))
    assert_self_contained(page)
    assert [each.get("class") for each in page.all("svg")].count("plot") == 2
    titles = [text for text in page.inside["title"] if ": time " in text]
    assert titles[:2] == ["first-block=0.2: time 0.52, psnr 33", "first-block=0.1: time 0.72, psnr 39"]
    assert len(titles) == 14
    assert next(text for text in page.inside["th"] if "=" in text) == "first-block=0.05"
    assert len(page.all("tr")) == 9


@pytest.mark.slow
def test_the_curve_of_8_bit_weights_is_measured(tmp_path: Path) -> None:
    for package in ("torchao", "scipy"):
        pytest.importorskip(package, reason="needs the test extra")
    import step_cache_curve

    source = tmp_path / "curves.json"
    arguments = ["--packs", "tiny-t2v", "--samples", "2", "--steps", "2", "--json", str(source)]
    step_cache_curve.main([*arguments, "--kinds", "8-bit weights"])
    [rows] = json.loads(source.read_text())["packs"].values()
    assert [row["name"] for row in rows[1:]] == [
        f"quantize={m}" for m in ("int8", "int8-dynamic", "fp8", "fp8-storage")
    ]
    assert all(row["work"] == 1 for row in rows)  # the same products, of other numbers
    assert all(10 < row["psnr"] < 99 for row in rows[1:])
    page = report(tmp_path, source)
    assert "quantize=fp8-storage" in page.text


def test_labels_do_not_lie_on_each_other() -> None:
    spots = [(10.0, 50.0), (12.0, 50.0), (30.0, 52.0), (300.0, 50.0), (15.0, 20.0)]
    assert report_charts._apart(spots) == [50, 64, 31, 50, 13]


@pytest.mark.parametrize("values", [[1e-320, 2e-320], [99.0, 99.0], [0.0, 0.0], [1e14, -1e14], [0.3, 1.7]])
def test_an_axis_holds_its_values(values: list[float]) -> None:
    place, ticks = report_charts._axis(values, 0, 100)
    assert all(0 <= place(value) <= 100 for value in values)
    assert 2 <= len(ticks) <= 8
    if min(values) > 1e-9:
        place, ticks = report_charts._log_axis(values, 0, 100)
        assert all(0 <= place(value) <= 100 for value in values)
        assert len(ticks) >= 2


def test_several_sources_are_sections_of_one_page(batch: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "kernels.json", kernels_run("abc", 1.0))
    page = report(tmp_path, batch, source, curves_file(tmp_path / "curves.json"), "--baseline", "none")
    assert [section["class"] for section in page.all("section")] == ["sweep", "kernels", "curves"]
    assert [link["href"] for link in page.all("a")] == ["#s1", "#s2", "#s3"]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)


# In a browser

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

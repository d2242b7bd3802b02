"""`cogvid report`: what is in the page, and what is refused."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.cli import main
from cogvid.run.compare import compare
from cogvid.ui import report_charts, report_sweep
from cogvid.ui.report import write_report
from tests.ui.reports import (
    FPS,
    FRAMES,
    HOSTILE,
    assert_self_contained,
    curves_file,
    kernels_run,
    name_of,
    read_manifest,
    report,
    write_batch,
    write_lines,
    write_manifest,
)


@pytest.fixture
def failed(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, check that it is refused in one line, and return the line without its start."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        [line] = capfd.readouterr().err.splitlines()
        return line.removeprefix("cogvid: error: ")

    return run


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

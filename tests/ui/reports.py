"""What tests of reports share: batches to show, and a reader of the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

import cogvid
from cogvid.cli import main

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

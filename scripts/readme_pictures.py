"""Make the pictures of README.md. The page and the report are taken in Chromium, with the extra `browser`.

python scripts/readme_pictures.py [demo] [page] [report]
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import cogvid
from cogvid.media.pictures import durations

SCRIPTS = Path(__file__).parent
PROMPTS = ("the red circle moves right", "the red circle moves left", "the red circle moves up")
_SCALE, _GAP, _LABEL = 3, 12, 18  # of a video of 64x64; pixels


def demo() -> None:
    """Write demo.webp: the input picture, and beside it the video of each prompt, playing."""
    picture = cogvid.load_image(SCRIPTS / "demo.png")
    pipe = cogvid.load("tiny-i2v", dtype="float32", device="cpu")
    videos = [pipe(prompt, image=picture, seed=42, output_type="uint8").frames[0].numpy() for prompt in PROMPTS]
    height, width = (side * _SCALE for side in videos[0].shape[1:3])
    still = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    pages = []
    for frames in zip(*videos, strict=True):
        page = Image.new("RGB", (len(PROMPTS) * (width + _GAP) + width, height + _LABEL), "white")
        draw = ImageDraw.Draw(page)
        for index, (label, frame) in enumerate(zip(("the picture", *PROMPTS), (still, *frames), strict=True)):
            tile = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
            page.paste(tile, (index * (width + _GAP), 0))
            draw.text(
                (index * (width + _GAP) + width // 2, height + 3),
                f'"{label}"' if index else label,
                "black",
                anchor="ma",
            )
        pages.append(page)
    file = io.BytesIO()
    lengths = durations(len(pages), pipe.model.fps, 1)
    pages[0].save(file, "WEBP", save_all=True, append_images=pages[1:], duration=lengths, loop=0, quality=80, method=6)
    (SCRIPTS / "demo.webp").write_bytes(file.getvalue())


def page() -> None:
    """Write page.png: the page after a run."""
    with tempfile.TemporaryDirectory() as directory, _chromium() as visit:
        command = [sys.executable, "-m", "cogvid", "ui", "--port", "0", "--output-dir", directory]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            seen = visit(server.stdout.readline().strip())
            seen.wait_for_selector("#plan .facts")
            seen.set_input_files("#picture input[type=file]", SCRIPTS / "demo.png")
            seen.fill("#prompt textarea", PROMPTS[0])
            seen.fill("#seed :is(input, textarea)", "42")
            seen.wait_for_selector("#picture img")
            seen.click("#generate")
            seen.wait_for_selector("#result video")
            _seek(seen, 1.0)
            _save(seen, "page.png")
            server.terminate()


def report() -> None:
    """Write report.png: the report of a sweep."""
    with tempfile.TemporaryDirectory() as directory, _chromium() as visit:
        shutil.copy(SCRIPTS / "demo.png", directory)
        job = ["--prompt", PROMPTS[0], "--image", "demo.png", "--seed", "42"]
        sweep = ["--sweep", "num_inference_steps=4,10,20", "guidance_scale=1,4"]
        for command in (["batch", *job, *sweep, "-o", "sweep"], ["report", "sweep", "-o", "sweep.html"]):
            subprocess.run([sys.executable, "-m", "cogvid", *command], cwd=directory, check=True)
        seen = visit(f"file://{directory}/sweep.html")
        seen.wait_for_selector("video")
        _seek(seen, 1.5)
        _save(seen, "report.png")


@contextmanager
def _chromium() -> Iterator[Callable[[str], Any]]:
    """Give a function that opens a URL and returns its page."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports] - of another extra

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light")

        def visit(url: str) -> Any:
            seen = context.new_page()
            seen.set_default_timeout(120_000)
            seen.goto(url)
            return seen

        yield visit
        browser.close()


def _seek(seen: Any, seconds: float) -> None:
    """Show all videos of a page at this time."""
    seen.evaluate(
        """async (seconds) => {
            for (const video of document.querySelectorAll("video")) {
                video.pause();
                video.controls = false;
                video.currentTime = seconds;
                await new Promise((done) => video.addEventListener("seeked", done, { once: true }));
            }
        }""",
        seconds,
    )


def _save(seen: Any, name: str) -> None:
    """Take the whole page, 1000 pixels wide, in 256 colours, which are enough for text and small videos."""
    picture = Image.open(io.BytesIO(seen.screenshot(full_page=True))).convert("RGB")
    small = picture.resize((1000, 1000 * picture.height // picture.width), Image.Resampling.LANCZOS)
    small.quantize(256).save(SCRIPTS / name, "PNG", optimize=True)


PICTURES: dict[str, Callable[[], None]] = {"demo": demo, "page": page, "report": report}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", help=f"which: {', '.join(PICTURES)}; all if not given")
    for name in parser.parse_args().pictures or PICTURES:
        PICTURES[name]()

"""Make the pictures of README.md. The page and the report are taken in Chromium, with Playwright.

python scripts/readme_pictures.py [demo]
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

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


PICTURES: dict[str, Callable[[], None]] = {"demo": demo}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", help=f"which: {', '.join(PICTURES)}; all if not given")
    for name in parser.parse_args().pictures or PICTURES:
        PICTURES[name]()

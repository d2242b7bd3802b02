"""What a notebook shows of a pipeline and of what it made; and the examples, run as notebooks."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.run.output import Output

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "scripts" / "examples").glob("*.py"))


def output(frames: Any) -> Output:
    return Output(frames, seed=7, fps=8, provenance={})


@pytest.mark.parametrize("count", [1, 2])
def test_videos_play_in_a_notebook(count: int, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (count, 9, 16, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    page = output(pixels)._repr_html_()
    assert page is not None
    sources = re.findall(r'<video controls [^>]*src="data:video/mp4;base64,([^"]+)"></video>', page)
    assert len(sources) == count
    for index, source in enumerate(sources):
        path = tmp_path / f"{index}.mp4"
        path.write_bytes(base64.b64decode(source))
        frames, fps = cogvid.read_video(path)
        assert frames.shape == (9, 16, 32, 3)
        assert fps == 8


@pytest.mark.parametrize("frames", [torch.zeros(1, 3, 16, 4, 4), [iter(())]], ids=["latents", "stream"])
def test_what_has_no_frames_is_not_played(frames: Any) -> None:
    out = output(frames)
    assert out._repr_html_() is None
    assert "\n" not in repr(out)


def test_an_output_says_what_it_is() -> None:
    assert repr(output(torch.zeros(2, 9, 16, 32, 3, dtype=torch.uint8))) == (
        "Output of 2 video(s): Tensor [2, 9, 16, 32, 3], seed 7, 8 fps"
    )


def test_a_pipeline_says_what_it_is_in_four_lines() -> None:
    pipe = cogvid.load("tiny-i2v", dtype="float32", device="cpu", qk_norm="rms")
    pipe.load_lora(ROOT / "scripts" / "demo_lora.safetensors", scale=0.5)
    first, second, third, fourth = repr(pipe).splitlines()
    assert first.startswith("cogvid pipeline of tiny-i2v: image-to-video")
    parameters = sum(p.numel() for p in pipe.transformer.parameters()) / 1e6
    assert f"transformer {parameters:,.1f} M" in second
    assert third == "runs on cpu in float32 with torch operations; qk_norm=rms, lora=demo_lora:0.5"
    model = pipe.model
    assert fourth.startswith(f"by default {model.num_frames} frames of {model.height}x{model.width} at {model.fps} fps")


def test_there_is_an_example_of_each_use() -> None:
    assert [path.stem for path in EXAMPLES] == [
        "compare_samplers", "generate", "plot_a_sweep", "read_a_record", "swap_attention",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A kernel for all examples, because a start of one takes seconds. It works where `scripts` is, as they expect."""
    pytest.importorskip("jupytext", reason="needs the extra test")
    from jupyter_client.manager import KernelManager

    directory = tmp_path_factory.mktemp("examples")
    (directory / "scripts").symlink_to(ROOT / "scripts")
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(directory), env={**os.environ, "PYTHONPATH": str(ROOT)})
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_a_notebook(path: Path, kernel: Any) -> None:
    import jupytext
    from nbconvert.preprocessors import ExecutePreprocessor

    done, _ = ExecutePreprocessor(timeout=300).preprocess(jupytext.read(path), km=kernel)
    outputs = [each for cell in done.cells if cell.cell_type == "code" for each in cell.outputs]
    shown = [each["data"] for each in outputs if "data" in each]
    assert any("text/html" in each or "image/png" in each for each in shown), "nothing to look at"
    warned = [each["text"] for each in outputs if each.get("name") == "stderr" and "Warning" in each["text"]]
    assert not warned

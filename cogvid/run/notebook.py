"""What a notebook, or the Python prompt, shows of a pipeline and of what it made."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvid.weights.load_options import LOAD_OPTIONS

if TYPE_CHECKING:
    from cogvid.run.output import Output
    from cogvid.run.pipeline import Pipeline

SMALLEST = 256  # pixels of width that a video is shown in, at least


def pipeline_lines(pipe: Pipeline) -> list[str]:
    """Return four lines: which model, what it has, where and how it runs, what it does by default."""
    model, placement, chosen = pipe.model, pipe.placement, pipe.placement.to_dict()
    parts = {"transformer": pipe.transformer, "T5": pipe.text_encoder.t5, "VAE": pipe.vae}
    sizes = [f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:,.1f} M" for name, part in parts.items()]
    changed = [f"{name}={chosen[name]}" for name, field in LOAD_OPTIONS.items() if _is_changed(name, field, chosen)]
    changed += [f"lora={each.name}:{each.scale:g}" for each in placement.lora]
    return [
        f"cogvid pipeline of {model.name}: {', '.join(model.tasks)}",
        f"parameters: {', '.join(sizes)}; from {pipe.checkpoint.directory.name}",
        f"runs on {placement.device} in {chosen['dtype']} with {pipe.ops} operations"
        + (f"; {', '.join(changed)}" if changed else ""),
        f"by default {model.num_frames} frames of {model.height}x{model.width} at {model.fps} fps, "
        f"{model.num_inference_steps} steps of {model.sampler}, guidance {model.guidance_scale:g}",
    ]


def _is_changed(name: str, field: Any, chosen: dict[str, Any]) -> bool:
    """Say whether an option of a load is not as it is by default; those of the line itself are left out."""
    upstream = (field.metadata["upstream"] or {}).get("diffusers")
    return name not in ("device", "dtype", "ops", "lora") and chosen[name] not in (field.default, upstream)


def output_line(out: Output) -> str:
    """Return what an output is, in one line."""
    kind = type(out.frames).__name__
    if hasattr(out.frames, "shape"):
        kind = f"{kind} {list(out.frames.shape)}"
    return f"Output of {len(out.frames)} video(s): {kind}, seed {out.seed}, {out.fps} fps"


def output_html(out: Output) -> str | None:
    """Return a page's part that plays the videos of an output, inside the page; None where there are no frames.

    Latents are no frames, and a stream is not used up by looking at it.
    """
    if not _has_frames(out):
        return None
    with tempfile.TemporaryDirectory() as directory:
        videos = [
            Path(out.save(Path(directory) / f"{index}.mp4", index)).read_bytes() for index in range(len(out.frames))
        ]
    return "\n".join(_player(video, f"video {index}, seed {out.seed}") for index, video in enumerate(videos))


def _has_frames(out: Output) -> bool:
    shape: Sequence[int] | None = getattr(out.frames, "shape", None)
    if shape is None:  # PIL images, or streams
        return isinstance(out.frames[0], list)
    return len(shape) == 5 and (shape[-1] == 3 or shape[2] == 3)


def _player(video: bytes, label: str) -> str:
    source = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
    return (
        f'<video controls loop autoplay muted playsinline aria-label="{html.escape(label)}" '
        f'style="min-width:{SMALLEST}px" src="{source}"></video>'
    )

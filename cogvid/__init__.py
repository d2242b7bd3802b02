"""CogVideoX inference: an image and a prompt in, a video out.

The names below are imported when they are first used, so that `import cogvid` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvid.config import CONFIGS as CONFIGS
    from cogvid.media.image import load_image as load_image
    from cogvid.media.video import VideoWriter as VideoWriter
    from cogvid.media.video import export_to_video as export_to_video
    from cogvid.media.video import read_video as read_video
    from cogvid.ops import BlockContext as BlockContext
    from cogvid.ops import Ops as Ops
    from cogvid.run.enhance import enhance as enhance
    from cogvid.run.invert import Inversion as Inversion
    from cogvid.run.invert import edit as edit
    from cogvid.run.invert import invert as invert
    from cogvid.run.load import load as load
    from cogvid.run.output import Output as Output
    from cogvid.run.pipeline import Pipeline as Pipeline
    from cogvid.run.record import read_record as read_record
    from cogvid.run.saved_run import SavedRun as SavedRun
    from cogvid.sampling.cache import STEP_CACHES as STEP_CACHES
    from cogvid.sampling.guidance import GUIDANCE as GUIDANCE
    from cogvid.sampling.samplers import SAMPLERS as SAMPLERS
    from cogvid.weights.load import load_transformer as load_transformer
    from cogvid.weights.load import load_vae as load_vae
    from cogvid.weights.parallel_option import Parallel as Parallel

__version__ = "0.1.0"

_HOME = {
    "BlockContext": "ops",
    "CONFIGS": "config",
    "GUIDANCE": "sampling.guidance",
    "Inversion": "run.invert",
    "Ops": "ops",
    "Output": "run.output",
    "Parallel": "weights.parallel_option",
    "Pipeline": "run.pipeline",
    "SAMPLERS": "sampling.samplers",
    "STEP_CACHES": "sampling.cache",
    "SavedRun": "run.saved_run",
    "VideoWriter": "media.video",
    "enhance": "run.enhance",
    "edit": "run.invert",
    "export_to_video": "media.video",
    "invert": "run.invert",
    "load": "run.load",
    "load_image": "media.image",
    "load_transformer": "weights.load",
    "load_vae": "weights.load",
    "read_record": "run.record",
    "read_video": "media.video",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cogvid' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cogvid.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

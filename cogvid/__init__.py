"""CogVideoX inference: an image and a prompt in, a video out.

The names below are imported when they are first used, so that `import cogvid` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvid.config import CONFIGS as CONFIGS
    from cogvid.guidance import GUIDANCE as GUIDANCE
    from cogvid.image import load_image as load_image
    from cogvid.ops import BlockContext as BlockContext
    from cogvid.ops import Ops as Ops
    from cogvid.output import Output as Output
    from cogvid.pipeline import Pipeline as Pipeline
    from cogvid.run_load import load as load
    from cogvid.samplers import SAMPLERS as SAMPLERS
    from cogvid.video import VideoWriter as VideoWriter
    from cogvid.video import export_to_video as export_to_video
    from cogvid.video import read_video as read_video
    from cogvid.weights_load import load_transformer as load_transformer
    from cogvid.weights_load import load_vae as load_vae

__version__ = "0.1.0"

_HOME = {
    "BlockContext": "ops",
    "CONFIGS": "config",
    "GUIDANCE": "guidance",
    "Ops": "ops",
    "Output": "output",
    "Pipeline": "pipeline",
    "SAMPLERS": "samplers",
    "VideoWriter": "video",
    "export_to_video": "video",
    "load": "run_load",
    "load_image": "image",
    "load_transformer": "weights_load",
    "load_vae": "weights_load",
    "read_video": "video",
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

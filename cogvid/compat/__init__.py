"""diffusers' names over `cogvid.load`, so that a script is ported by its import lines.

    from cogvid.compat import CogVideoXImageToVideoPipeline, export_to_video, load_image

The pipelines take the calls, names and defaults of diffusers' `CogVideoXPipeline`, `CogVideoXImageToVideoPipeline`,
`CogVideoXVideoToVideoPipeline` and `CogVideoXFunControlPipeline`; the same generator gives the same video. What has no
meaning here raises an error of one line that names the way to go. Weights are loaded when they are first used, so that
the modes that a script asks for after `from_pretrained` (offloading, tiling) are known by then; a mode that is asked
for later loads them again. It differs from diffusers in what diffusers ignores without a word: `num_videos_per_prompt`
has its effect, and video-to-video takes `num_frames`, the number of frames that are used.
"""

from cogvid.compat.media import export_to_video, load_image, load_video
from cogvid.compat.parts import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from cogvid.compat.pipelines import (
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)

__all__ = [
    "AutoencoderKLCogVideoX",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CogVideoXFunControlPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXPipeline",
    "CogVideoXTransformer3DModel",
    "CogVideoXVideoToVideoPipeline",
    "export_to_video",
    "load_image",
    "load_video",
]

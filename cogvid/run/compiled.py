"""Run the parts of a model through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def compile_modules(modules: Iterable[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile modules in place, for any batch and size; the first calls then take minutes.

    Modules of one class share their graphs. The blocks of a transformer have one, and another for a batch of one. The
    VAE's decoder has one for each kind of chunk: 1, 2 or 3 latent frames, the first of a video or a later one. Each is
    a whole graph: what cannot be traced, such as a user's attention that prints, raises instead of running slowly.
    Hooks on a module itself run as before, outside of its graph.

    The results differ from those of an uncompiled model by rounding.

    backend: of torch.compile.
    """
    for module in modules:
        # Not with `nn.Module.compile`, which takes the hooks of the module into the graph.
        module.forward = torch.compile(module.forward, dynamic=True, fullgraph=True, backend=backend)

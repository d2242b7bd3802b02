"""LPIPS: how far two pictures are apart in the features of a network that was trained on photos.

https://arxiv.org/abs/1801.03924, with AlexNet, as torchmetrics computes it. torchmetrics and torchvision are the extra
`metrics`. torchmetrics has the weights of LPIPS itself. Those of AlexNet, 233 MiB, are downloaded by torchvision from
download.pytorch.org, once, into the folder of `torch.hub.get_dir()`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from http.client import HTTPException
from importlib.metadata import version
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

SMALLEST = 31  # pixels a side: below, AlexNet has nothing left to pool


def load_lpips(*, local_files_only: bool = False) -> Callable[[Tensor, Tensor], float]:
    """Return the function that measures two pictures `[H, W, 3]` uint8, at least 31x31; 0 for equal ones.

    local_files_only: do not download the weights of AlexNet.

    Raises:
        ImportError: torchmetrics or torchvision is missing, or torchvision is of another build than torch.
        OSError: the weights are neither here nor can they be downloaded.
        ValueError: they are not here and must not be downloaded, or their file is damaged.
    """
    network, weights = _import()
    file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    wanted = f"a connection, or the file of {weights.url} as {file}"
    if local_files_only and not os.path.exists(file):
        raise ValueError(f"lpips: got no weights of AlexNet, and none may be downloaded, want {wanted}")
    try:
        metric = network(net_type="alex", normalize=True)
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise OSError(f"lpips: got no weights of AlexNet ({error}), want {wanted}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"lpips: got weights of AlexNet that are damaged, want another {file} ({error})") from error

    def measure(x: Tensor, y: Tensor) -> float:
        # torchmetrics wants values from 0 to 1.
        return metric(*(each.permute(2, 0, 1)[None].float() / 255 for each in (x, y))).item()

    return measure


def _import() -> tuple[Any, Any]:
    """Import the class of the measure and the description of AlexNet's weights."""
    try:
        # torchvision first, because torchmetrics does not say why it cannot be imported.
        from torchvision.models import AlexNet_Weights  # noqa: I001  # pyright: ignore[reportMissingImports]
        from torchmetrics.image.lpip import (  # pyright: ignore[reportMissingImports]
            LearnedPerceptualImagePatchSimilarity,
        )
    except ImportError as error:
        wanted = "torchmetrics and torchvision: pip install -c scripts/constraints.txt '.[metrics]'"
        raise ImportError(f"lpips: got no {error.name or error}, want {wanted}") from error
    except RuntimeError as error:
        got = f"torchvision {version('torchvision')}, which torch {torch.__version__} cannot load ({error})"
        raise ImportError(f"lpips: got {got}, want the build for this torch, of the same index") from error
    return LearnedPerceptualImagePatchSimilarity, AlexNet_Weights.IMAGENET1K_V1

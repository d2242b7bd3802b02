"""Kernel tests run on a GPU where there is one, otherwise in Triton's interpreter; fresh memory holds NaN."""

import os
from collections.abc import Iterator

import pytest
import torch

import measure

# Whether a kernel is interpreted is decided when its module is imported, so before any test module of this directory.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What kernels are held against must be fp32 where it says fp32; cuDNN takes TF32 unless told otherwise.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

# torch remembers at its first use which functions `with torch.device(...)` redirects. It must not remember the poisoned
# ones below, or every later "meta" model of this process would be built in real memory.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels of this run can be launched."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """An element left unwritten cannot pass by luck."""
    with measure.poisoned_memory():
        yield

"""Kernel tests run on a GPU where there is one, otherwise in Triton's interpreter; fresh memory holds NaN."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# Whether a kernel is interpreted is decided when its module is imported, so before any test module of this directory.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# torch remembers at its first use which functions `with torch.device(...)` redirects. It must not remember the poisoned
# ones below, or every later "meta" model of this process would be built in real memory.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels of this run can be launched."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every torch.empty* return NaN (or the largest integer): an element left unwritten cannot pass by luck."""

    def poison(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: object, **kwargs: object) -> Tensor:
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return poisoned

    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (Tensor, "new_empty"), (Tensor, "new_empty_strided"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))

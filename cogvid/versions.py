"""The lowest versions of the dependencies, checked before a run: an old one would be noticed after hours of work."""

from __future__ import annotations

import importlib
import os
import re
from importlib.metadata import PackageNotFoundError, version

LOWEST = {  # what pyproject.toml asks for; a test holds the two together
    "torch": "2.11",
    "triton": "3.6",
    "einops": "0.8",
    "safetensors": "0.4.3",
    "transformers": "5.0",
    "sentencepiece": "0.2",
    "huggingface_hub": "1.3",
    "numpy": "1.26",
    "pillow": "10.3",
    "av": "18.0",
    "tqdm": "4.66",
}


def check(*names: str) -> None:
    """Raise `ImportError` unless these packages are installed and new enough; without names, all but triton."""
    for name in names or [name for name in LOWEST if name != "triton"]:
        try:
            got = version(name)
        except PackageNotFoundError:
            got = None
        _check(name, got)


def check_triton() -> None:
    """Raise `ImportError` unless Triton is there and new enough, and, where kernels are interpreted, NumPy suits it."""
    # Asked itself, because the package goes by several names, one for each make of GPU.
    try:
        triton = importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        triton = None
    triton = _check("triton", triton)
    numpy = version("numpy")
    if os.environ.get("TRITON_INTERPRET") == "1" and _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        raise ImportError(f"numpy: got {numpy}, want older than 2.4 in the interpreter of triton {triton}")


def _check(name: str, got: str | None) -> str:
    if got is None or _release(got) < _release(LOWEST[name]):
        raise ImportError(f"{name}: got {got or 'none'}, want {LOWEST[name]} or newer")
    return got


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a release; what follows them ("rc1", "+cpu") does not count, and 5 is 5.0."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)

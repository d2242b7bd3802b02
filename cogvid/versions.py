"""The lowest versions of the dependencies. They are checked before a run, so that it does not fail after hours."""

from __future__ import annotations

import importlib
import os
import re
from importlib.metadata import PackageNotFoundError, version

LOWEST = {  # the same as in pyproject.toml; a test compares the two
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
    "jinja2": "3.1",
}


def check(*names: str) -> None:
    """Raise `ImportError` unless these packages are installed and new enough. Default: all except triton."""
    for name in names or [name for name in LOWEST if name != "triton"]:
        try:
            got = version(name)
        except PackageNotFoundError:
            got = None
        _check(name, got)


def check_triton() -> None:
    """Raise `ImportError` unless Triton is installed and new enough, and its interpreter, if used, fits NumPy."""
    # The module is imported, because the package has another name for each maker of GPUs.
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
    """Return the numbers of a version without trailing zeros (5.0 equals 5) and suffixes ("rc1", "+cpu")."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)

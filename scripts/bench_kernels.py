"""The benchmark of the kernels from a checkout; installed, it is `python -m cogvid_kernels.bench`."""

from __future__ import annotations

import sys

import measure  # noqa: F401 - makes the checkout importable
from cogvid_kernels.bench.command import main

if __name__ == "__main__":
    sys.exit(main())

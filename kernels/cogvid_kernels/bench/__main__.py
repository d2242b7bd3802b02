"""`python -m cogvid_kernels.bench`."""

import sys

from cogvid_kernels.bench.command import main

if __name__ == "__main__":
    sys.exit(main())

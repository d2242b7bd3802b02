"""`python -m cogvid` is the `cogvid` command."""

import sys

from cogvid.cli import main

sys.exit(main())

"""Write the line counts of README.md, in "What is where", and those of the examples in cogvid/README.md.

python scripts/file_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = ROOT / "cogvid" / "README.md"
_ROW = re.compile(r"^(\| \[`[^`]+`\]\((cogvid/[^)]+\.py)\) \|) \d* \|", re.MULTILINE)
_ROOM = re.compile(r"^(\| \[`[^`]+/`\]\((cogvid/[^)]+)\) \|) \d* \|", re.MULTILINE)
_EXAMPLE = re.compile(r"^(\*\*[^*\n]+\*\*) \(\d* lines\)(.*?```python\n(.*?)```)", re.MULTILINE | re.DOTALL)
_CORE = re.compile(r"[\d,]+ lines(?= in all)")
# What a reader must know: what each run goes through. The options below are read by those who want them.
CORE = ("config.py", "ops.py", "models/*.py", "sampling/*.py", "run/pipeline.py")
NOT_CORE = (
    "models/cut_positions.py",
    "models/tiling.py",
    "models/quantize.py",
    "sampling/cache.py",
    "sampling/sat_schedule.py",
)


def core() -> list[Path]:
    """Return the files of the core."""
    package = ROOT / "cogvid"
    files = [path for pattern in CORE for path in package.glob(pattern)]
    return [path for path in files if path.relative_to(package).as_posix() not in NOT_CORE]


def counted(text: str) -> str:
    """Return the text of a page with the line counts as they are now."""
    text = _CORE.sub(f"{sum(map(lines, core())):,} lines", text)
    text = _ROOM.sub(lambda row: f"{row[1]} {sum(map(lines, (ROOT / row[2]).rglob('*.py')))} |", text)
    text = _ROW.sub(lambda row: f"{row[1]} {lines(ROOT / row[2])} |", text)
    return _EXAMPLE.sub(lambda example: f"{example[1]} ({statements(example[3])} lines){example[2]}", text)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def statements(code: str) -> int:
    """Count the lines of an example that are not blank and no import."""
    return sum(bool(line.strip()) and not line.startswith(("import ", "from ")) for line in code.splitlines())


if __name__ == "__main__":
    for page in (README, EXAMPLES):
        page.write_text(counted(page.read_text()))

#!/usr/bin/env bash
# Tests with the lowest versions that pyproject.toml allows, those of the test extra included, in .venv-lowest.
#
# Usage: bash scripts/test_lowest.sh [--list | PYTEST ARGUMENTS]
#   --list          print the versions and do nothing
#   PYTHON=...      the lowest Python that pyproject.toml allows; others lack wheels of the old versions
#   LOWEST_TORCH=1  take torch's lowest version too: a build for CUDA, of gigabytes; otherwise that of constraints.txt
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"

lowest="$("$python" - <<'EOF'
import os, re, sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
with open("scripts/constraints.txt", encoding="utf-8") as file:
    tested = dict(line.strip().split("==") for line in file if not line.startswith("#"))
running, wanted = "{}.{}".format(*sys.version_info), project["requires-python"].removeprefix(">=")
if running != wanted:
    sys.exit(f"error: PYTHON: got {running}, want {wanted}, the lowest that pyproject.toml allows")
for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
    name, relation, version = re.match(r"([\w-]+)(?:\[\w+\])?(>=|==)([\d.]+)", requirement).groups()
    if name == "torch" and os.environ.get("LOWEST_TORCH") != "1":
        print(f"torch {version}: not run; {tested[name]} in its place (LOWEST_TORCH=1 runs it)", file=sys.stderr)
        version = tested[name]
    print(f"{name}=={version}")
EOF
)"
if [ "${1:-}" = --list ]; then
  echo "$lowest"
  exit
fi
[ -x .venv-lowest/bin/python ] || "$python" -m venv .venv-lowest
echo "$lowest" > .venv-lowest/constraints.txt
.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/constraints.txt -e ".[test]"
processes="$(nproc)"
export OMP_NUM_THREADS=1
exec .venv-lowest/bin/python -m pytest -n "$processes" -q "$@"

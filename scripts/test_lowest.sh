#!/usr/bin/env bash
# Tests with the lowest versions that pyproject.toml allows, those of the test extra included, in .venv-lowest.
#
# Usage: bash scripts/test_lowest.sh [--list | PYTEST ARGUMENTS]
#   --list          print the versions and do nothing
#   PYTHON=...      the lowest Python that pyproject.toml allows; others lack wheels of the old versions
#   LOWEST_TORCH=1  take torch's lowest version too: a build for CUDA, of gigabytes; otherwise that of constraints.txt
#
# Run on 2026-11-21, commit 95d7dc1, Linux on x86-64, no GPU, Python 3.11.7: 1601 tests passed and 2 were skipped with
# triton 3.6.0 (its interpreter), einops 0.8.0, safetensors 0.8.0, transformers 5.20.0, sentencepiece 0.2.0,
# huggingface_hub 1.32.0, numpy 1.26.0, pillow 10.3.0, av 18.0.0, tqdm 4.66.0, diffusers 0.42.1, protobuf 7.36.1.
# Not run: torch 2.11 (2.13.0+cpu in its place), a GPU, other Pythons and systems.
# Why not lower: av 17.1 lacks swscale's flags for rounding and full chroma. T5Tokenizer of transformers 5.0, which the
# tests compare with, gives other ids, and 5.5, 5.10, 5.13, 5.15, 5.18 and 5.19 cannot read a model without normalisation.
# diffusers 0.42.1 asks for safetensors 0.8 and huggingface_hub 1.32, sentencepiece 0.2.3 for protobuf 7.36.1. The others
# were not tried lower.
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

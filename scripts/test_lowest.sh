#!/usr/bin/env bash
# Tests with the lowest versions that pyproject.toml allows, each set in a virtual environment under .venv-lowest:
#   base   the dependencies and the test tools, without diffusers, which asks for newer ones; what needs it is skipped
#   test   the dependencies and the test extra
#
# Usage: bash scripts/test_lowest.sh [base|test] [--list | PYTEST ARGUMENTS]
#   base|test       that set alone; otherwise both, one after the other
#   --list          print the versions and do nothing
#   PYTHON=...      the lowest Python that pyproject.toml allows; others lack wheels of the old versions
#   LOWEST_TORCH=1  take torch's lowest version too: a build for CUDA, of gigabytes; otherwise that of constraints.txt
#   PROCESSES=...   how many processes test; otherwise one per core
#
# Run on 2026-11-21, commit 7b4c7dd, Linux on x86-64, no GPU, Python 3.11.7, triton 3.6.0 (its interpreter),
# einops 0.8.0, sentencepiece 0.2.0, numpy 1.26.0, pillow 10.3.0, av 18.0.0, tqdm 4.66.0, protobuf 7.36.1, pytest 8.3.0:
#   base   1386 tests passed and 216 were skipped (tests/parity counts as one) with transformers 5.0.0,
#          huggingface_hub 1.3.0, safetensors 0.4.3: 211 need diffusers, 3 need complex numbers, which safetensors
#          writes since 0.7, and 2 another user than root
#   test   2376 passed and 2 were skipped with transformers 5.20.0, huggingface_hub 1.32.0, safetensors 0.8.0,
#          diffusers 0.42.1
# Not run: torch 2.11 (2.13.0+cpu in its place), a GPU, other Pythons and systems.
# Why not lower: transformers 5.0 asks for huggingface_hub 1.3 and safetensors 0.4.3; av 17.1 lacks swscale's flags for
# rounding and full chroma. Only the tests ask for more: T5Tokenizer of transformers 5.0, which they compare with, gives
# other ids, and that of 5.5, 5.10, 5.13, 5.15, 5.18 and 5.19 cannot read a model without normalisation;
# diffusers 0.42.1 asks for safetensors 0.8 and huggingface_hub 1.32, sentencepiece 0.2.3 for protobuf 7.36.1. The
# others were not tried lower.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
case "${1:-}" in
  base | test) sets="$1"; shift ;;
  *) sets="base test" ;;
esac

lowest() {
  "$python" - "$1" <<'EOF'
import os, re, sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
with open("scripts/constraints.txt", encoding="utf-8") as file:
    tested = dict(line.strip().split("==") for line in file if not line.startswith("#"))
running, wanted = "{}.{}".format(*sys.version_info), project["requires-python"].removeprefix(">=")
if running != wanted:
    sys.exit(f"error: PYTHON: got {running}, want {wanted}, the lowest that pyproject.toml allows")


def read(requirements):
    found = (re.match(r"([\w-]+)(?:\[\w+\])?(?:>=|==)([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found}


base, test = read(project["dependencies"]), read(project["optional-dependencies"]["test"])
if sys.argv[1] == "base":
    del test["diffusers"]
    versions = test | base
else:
    versions = base | test
if os.environ.get("LOWEST_TORCH") != "1":
    print(f"torch {base['torch']}: not run; {tested['torch']} in its place (LOWEST_TORCH=1 runs it)", file=sys.stderr)
    versions["torch"] = tested["torch"]
if sys.platform != "linux":
    del versions["triton"]
for name, version in versions.items():
    print(f"{name}=={version}")
EOF
}

export OMP_NUM_THREADS=1
for set in $sets; do
  versions="$(lowest "$set")"
  if [ "${1:-}" = --list ]; then
    echo "$versions" | sed "s/^/$set /"
    continue
  fi
  venv=".venv-lowest/$set"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  echo "$versions" > "$venv/versions.txt"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$venv/versions.txt" -e .
  "$venv/bin/python" -m pytest -n "${PROCESSES:-$(nproc)}" -q "$@"
done

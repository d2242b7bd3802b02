#!/usr/bin/env bash
# Makes .venv, installs cogvid into it and animates the shipped picture with the shipped model.
# Usage: bash scripts/demo.sh [OUTPUT.mp4] [PROMPT]
set -euo pipefail
output="$(realpath -m "${1:-outputs/demo.mp4}")"
prompt="${2:-the red circle moves right}"
. "$(dirname "$0")/install.sh" ""  # an empty argument, or a sourced script would see those of this one
mkdir -p "$(dirname "$output")"
.venv/bin/cogvid generate "$prompt" --image scripts/demo.png --model tiny-i2v --output "$output" --seed 42

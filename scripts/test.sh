#!/usr/bin/env bash
# Installs the test extra into .venv, then runs lint, types and tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/install.sh" test
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
pyright
# One test process per core, one compute thread each: small models gain nothing from more. nproc heeds the variable.
processes="$(nproc)"
export OMP_NUM_THREADS=1
exec python -m pytest -n "$processes" --durations=15 -q "$@"

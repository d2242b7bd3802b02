#!/usr/bin/env bash
# Installs the test extra into .venv, then runs lint, types and tests. Arguments go to pytest.
# --browser, as the first argument, runs the tests in Chromium instead; it installs the extra browser, and as root
# Debian's Chromium where there is none.
set -euo pipefail
extras=test
if [ "${1:-}" = --browser ]; then
  extras=test,browser
  shift
  if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
      echo "error: chromium: got none, want it installed, such as by: sudo apt-get install chromium" >&2
      exit 2
    fi
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends chromium
  fi
fi
. "$(dirname "$0")/install.sh" "$extras"
export PATH="$PWD/.venv/bin:$PATH"
# One test process per core, one compute thread each: small models gain nothing from more. nproc heeds the variable.
processes="$(nproc)"
export OMP_NUM_THREADS=1
if [ "$extras" != test ]; then
  exec python -m pytest -m browser --durations=15 -q tests/ui "$@"
fi
ruff check .
ruff format --check .
pyright
exec python -m pytest -n "$processes" --durations=15 -q "$@"

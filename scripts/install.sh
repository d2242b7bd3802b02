# Sourced by demo.sh and test.sh: makes .venv in the repository root, once, and installs the project into it.
# Usage: . scripts/install.sh [EXTRA]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $python is older than Python 3.11; name another one with PYTHON=..." >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
# The stamp holds what was installed from, so a second run does not ask the package index anything.
stamp=".venv/.installed-${1:-base}"
wanted="$(cat pyproject.toml scripts/constraints.txt | sha256sum)"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".${1:+[$1]}"
  printf '%s' "$wanted" > "$stamp"
fi

#!/usr/bin/env bash
# Sets up .venv if needed, then runs ruff and the test suite. Arguments go to pytest: bash tools/test.sh tests/unit -k lock
# The slowest tests, and those that need a GPU, run only when asked for: bash tools/test.sh -m slow, bash tools/test.sh -m gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -m "not gpu and not slow" "$@"

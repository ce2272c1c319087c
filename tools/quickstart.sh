#!/usr/bin/env bash
# Sets up .venv, makes the model, then trains it and shows what it learned. Arguments are options of the training command:
# bash tools/quickstart.sh seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
.venv/bin/python tools/make_smollm2.py
exec .venv/bin/python -m megatron_aspo train examples/recipes/quickstart.yaml "$@"

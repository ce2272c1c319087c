#!/usr/bin/env bash
# Trains a model of 1.5 billion parameters on mathematics with ASPO: examples/recipes/aspo_qwen2.5_1.5b_math.yaml.
#   bash examples/run_aspo_qwen2.5_1.5b_math.sh
#   bash examples/run_aspo_qwen2.5_1.5b_math.sh --dry-run   what it would do
# examples/launch.sh lists the environment variables; arguments are key.path=value overrides.
set -euo pipefail
export RECIPE=aspo_qwen2.5_1.5b_math
export NNODES=${NNODES:-1} TENSOR_PARALLEL=${TENSOR_PARALLEL:-1} ROLLOUT_TENSOR_PARALLEL=${ROLLOUT_TENSOR_PARALLEL:-1}
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"

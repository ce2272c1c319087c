#!/usr/bin/env bash
# Trains a dense model of 8 billion parameters with ASPO on 2 nodes of 8 GPUs: examples/recipes/aspo_qwen3_8b_code.yaml.
#   HOSTFILE=hosts bash examples/run_aspo_qwen3_8b_code.sh
#   bash examples/run_aspo_qwen3_8b_code.sh --dry-run   what it would do
# examples/launch.sh lists the environment variables; arguments are key.path=value overrides.
set -euo pipefail
export RECIPE=aspo_qwen3_8b_code
export NNODES=${NNODES:-2} TENSOR_PARALLEL=${TENSOR_PARALLEL:-4} ROLLOUT_TENSOR_PARALLEL=${ROLLOUT_TENSOR_PARALLEL:-2}
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"

#!/usr/bin/env bash
# The GRPO baseline of run_aspo_qwen2.5_1.5b_code.sh: examples/recipes/grpo_qwen2.5_1.5b_code.yaml.
#   bash examples/run_grpo_qwen2.5_1.5b_code.sh
#   bash examples/run_grpo_qwen2.5_1.5b_code.sh --dry-run   what it would do
# examples/launch.sh lists the environment variables; arguments are key.path=value overrides.
set -euo pipefail
export RECIPE=grpo_qwen2.5_1.5b_code
export NNODES=${NNODES:-1} TENSOR_PARALLEL=${TENSOR_PARALLEL:-1} ROLLOUT_TENSOR_PARALLEL=${ROLLOUT_TENSOR_PARALLEL:-1}
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"

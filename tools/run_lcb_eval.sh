#!/usr/bin/env bash
# Evaluates each new checkpoint on LiveCodeBench v5 once: tools/run_eval_pipeline.sh with that task for every directory.
#
#   bash tools/run_lcb_eval.sh MODEL_ROOT [key=value …]
#   STAGE=grade bash tools/run_lcb_eval.sh MODEL_ROOT   grades, on a machine without GPUs, what STAGE=generate generated on one with them
#
# Environment, outputs and status are those of run_eval_pipeline.sh; problems, block and time limits those of Archer2.0's grader.
set -euo pipefail
TASKS=${TASKS:-livecodebench_v5} exec bash "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/run_eval_pipeline.sh" "$@"

#!/usr/bin/env bash
# Evaluates a model on one dataset, and leaves the files of Archer2.0's scripts/eval/run_eval.sh: no line of this file is to be edited.
#
#   bash tools/run_eval.sh MODEL_PATH DATASET [key=value …]
#
# DATASET: aime24, aime25, livecodebench_v5, livecodebench_v6 or humaneval; its file is DATA_DIR/DATASET with .parquet, .jsonl or .json.
# Environment: DATA_DIR (./data/test), OUTPUT_DIR (MODEL_PATH/output), TP_SIZE (1), ENGINES (1), ACCEPT_COUNT (empty; 1 accepts another
# number of problems than the dataset's). key=value: values that replace the protocol's, such as samples=4.
#
# Leaves OUTPUT_DIR/DATASET.parquet (the rows with a column `responses`), DATASET.pass.csv and DATASET.results.json; the evaluation itself
# is in OUTPUT_DIR/DATASET/. If DATASET.pass.csv is there nothing is done. A second call goes on where a killed one stopped.
# Status: 0 done, 2 a mistake that you can cure, else that of megatron-aspo eval.
set -euo pipefail
if [[ $# -lt 2 || $1 == -* ]]; then
    echo "usage: bash tools/run_eval.sh MODEL_PATH DATASET [key=value …]" >&2
    exit 2
fi
# shellcheck source=tools/eval_common.sh
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/eval_common.sh"
model=$1 dataset=$2
shift 2
output=${OUTPUT_DIR:-$model/output}
if [[ -e $output/$dataset.pass.csv ]]; then
    echo "$output/$dataset.pass.csv is there: nothing to do"
    exit 0
fi
choose_dataset "$dataset"
"$python" -m megatron_aspo eval "$model" --protocol "$protocol" --out "$output/$dataset" "${words[@]}" \
    --set "engine.tensor_parallel=${TP_SIZE:-1}" "engine.engines=${ENGINES:-1}" "$@"
"$python" "$root/tools/export_eval.py" "$output/$dataset" --to "$output/$dataset.parquet" --model "$model"

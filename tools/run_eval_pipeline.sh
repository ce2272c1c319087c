#!/usr/bin/env bash
# Evaluates each new checkpoint of some runs once, as Archer2.0's tools/run_eval_pipeline.sh does: no line of this file is to be edited.
#
#   bash tools/run_eval_pipeline.sh MODEL_ROOT [key=value …]
#
# Environment: TARGET_DIRS (names of directories below MODEL_ROOT, separated by blanks; default all; with ONCE=1 they must exist), TASKS (default: aime24 aime25 for a
# directory with math in its name, else livecodebench_v5), DATA_DIR (./data/test), RECIPE (of directories that are no runs of ours),
# ACCEPT_COUNT (empty; 1 accepts another number of problems), POLL_S (60), ONCE (empty; 1 evaluates what is there and ends), STAGE (all; with
# `generate` here and `grade` in a second call on another machine, which needs MODEL_ROOT but neither checkpoints nor GPUs).
#
# For each directory and task, MODEL_ROOT/DIR/evaluations/TASK has results.csv, and of each step step_N/output/TASK.parquet, .pass.csv and
# .results.json. Any number of these may run at the same time, on several hosts too. Status with ONCE=1: 0, or 1 if an evaluation failed three
# times or could not be exported. A mistake that you can cure ends it with status 2.
set -euo pipefail
if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: bash tools/run_eval_pipeline.sh MODEL_ROOT [key=value …]" >&2
    exit 2
fi
# shellcheck source=tools/eval_common.sh
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/eval_common.sh"
models=$1
shift
[[ -d $models ]] || fail "there is no directory $models"
status=0
awaited= # directories of TARGET_DIRS that were missing: the run that makes one may be starting

evaluate() { # DIRECTORY TASK [key=value …]: evaluates the checkpoints that are there
    local directory=$1 task=$2 out=$1/evaluations/$2 result=0 step
    shift 2
    choose_dataset "$task"
    [[ -z ${RECIPE:-} ]] || words+=(--recipe "$RECIPE")
    [[ -z ${STAGE:-} ]] || words+=(--stage "$STAGE")
    [[ $# -eq 0 ]] || words+=(--set "$@")
    "$python" -m megatron_aspo eval "$directory" --watch --once --protocol "$protocol" --out "$out" "${words[@]}" || result=$?
    [[ $result -le 1 ]] || exit "$result"
    [[ $result -eq 0 ]] || status=1
    for step in "$out"/step_*/; do
        [[ -e ${step}result.json && ! -e ${step}output/$task.pass.csv ]] || continue
        "$python" "$root/tools/export_eval.py" "$step" --to "${step}output/$task.parquet" --model "$directory" || status=1
    done
}

while true; do
    if [[ -n ${TARGET_DIRS:-} ]]; then read -ra names <<<"$TARGET_DIRS"; else mapfile -t names < <(find -L "$models" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort); fi
    for name in "${names[@]}"; do
        if [[ ! -d $models/$name ]]; then
            [[ -z ${ONCE:-} ]] || fail "there is no directory $models/$name; correct TARGET_DIRS"
            [[ $awaited == *" $name "* ]] || echo "there is no directory $models/$name yet; waiting for it"
            awaited+=" $name "
            continue
        fi
        if [[ ${name,,} == *math* ]]; then tasks="aime24 aime25"; else tasks=livecodebench_v5; fi
        for task in ${TASKS:-$tasks}; do
            evaluate "$models/$name" "$task" "$@"
        done
    done
    [[ -z ${ONCE:-} ]] || exit "$status"
    sleep "${POLL_S:-60}"
done

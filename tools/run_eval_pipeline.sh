#!/usr/bin/env bash
# Evaluates each new checkpoint of some runs once, as Archer2.0's tools/run_eval_pipeline.sh does: no line of this file is to be edited.
#
#   bash tools/run_eval_pipeline.sh MODEL_ROOT [key=value …]
#
# Environment: TARGET_DIRS (names of directories below MODEL_ROOT, separated by blanks; default all), TASKS (default: aime24 aime25 for a
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
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
python=$root/.venv/bin/python
[[ -x $python ]] || python=python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
models=$1
shift
data_dir=${DATA_DIR:-./data/test}

fail() {
    echo "run_eval_pipeline.sh: error: $*" >&2
    exit 2
}

[[ -d $models ]] || fail "there is no directory $models"
status=0

evaluate() { # DIRECTORY TASK [key=value …]: evaluates the checkpoints that are there
    local directory=$1 task=$2 protocol=$2 out=$1/evaluations/$2 words=() result=0 suffix step
    shift 2
    case $task in
    aime24 | aime25 | humaneval) ;;
    livecodebench_v5 | livecodebench_v6) protocol=archer_lcb_${task#livecodebench_} ;;
    *) fail "task $task is not known; choose aime24, aime25, livecodebench_v5, livecodebench_v6 or humaneval" ;;
    esac
    for suffix in parquet jsonl json; do
        [[ -e $data_dir/$task.$suffix ]] && words=(--data "$data_dir/$task.$suffix") && break
    done
    [[ ${#words[@]} -gt 0 || $task == humaneval ]] || fail "there is no $data_dir/$task.parquet, .jsonl or .json; set DATA_DIR"
    [[ -z ${RECIPE:-} ]] || words+=(--recipe "$RECIPE")
    [[ -z ${ACCEPT_COUNT:-} ]] || words+=(--accept-count)
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
        [[ -d $models/$name ]] || fail "there is no directory $models/$name; correct TARGET_DIRS"
        if [[ ${name,,} == *math* ]]; then tasks="aime24 aime25"; else tasks=livecodebench_v5; fi
        for task in ${TASKS:-$tasks}; do
            evaluate "$models/$name" "$task" "$@"
        done
    done
    [[ -z ${ONCE:-} ]] || exit "$status"
    sleep "${POLL_S:-60}"
done

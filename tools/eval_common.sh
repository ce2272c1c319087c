# shellcheck shell=bash disable=SC2034  # the scripts that source this read the variables
# Sourced by run_eval.sh and run_eval_pipeline.sh: finds Python, and maps a dataset's name to a protocol and the file with its problems.
# Paths are relative to the caller's directory: no cd.
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
python=$root/.venv/bin/python
[[ -x $python ]] || python=python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
data_dir=${DATA_DIR:-./data/test}

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

choose_dataset() { # NAME: sets `protocol`, and `words` to the options of megatron-aspo eval for the dataset's file and for ACCEPT_COUNT
    local suffix
    case $1 in
    aime24 | aime25 | humaneval) protocol=$1 ;;
    livecodebench_v5 | livecodebench_v6) protocol=archer_lcb_${1#livecodebench_} ;;
    *) fail "dataset $1 is not known; choose aime24, aime25, livecodebench_v5, livecodebench_v6 or humaneval" ;;
    esac
    words=()
    for suffix in parquet jsonl json; do
        [[ -e $data_dir/$1.$suffix ]] && words=(--data "$data_dir/$1.$suffix") && break
    done
    [[ ${#words[@]} -gt 0 || $1 == humaneval ]] || fail "there is no $data_dir/$1.parquet, .jsonl or .json; set DATA_DIR"
    [[ -z ${ACCEPT_COUNT:-} ]] || words+=(--accept-count)
}

#!/usr/bin/env bash
# Merges a checkpoint of any number of ranks into one Hugging Face directory:
# bash tools/model_merge.sh runs/NAME/checkpoints/step_10 TARGET [options of convert, such as --dtype bfloat16]
set -euo pipefail
if [[ $# -lt 2 || $1 == -* || $2 == -* ]]; then
    echo "usage: bash tools/model_merge.sh CHECKPOINT TARGET [options of megatron-aspo convert]" >&2
    exit 2
fi
# Paths are relative to the caller's directory: no cd.
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
python=$root/.venv/bin/python
[[ -x $python ]] || python=python
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$root/tools/convert_megatron_to_hf.py" "$@"

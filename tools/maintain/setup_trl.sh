#!/usr/bin/env bash
# Makes build/trl, the environment of TRL that tools/bench/bench_end_to_end.py compares with: torch, transformers and their shared dependencies
# have the versions of tools/locks/cpu-py311.txt. Made once (1.5 GB); remove the directory to make it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
trl=1.16.0
lock=tools/locks/cpu-py311.txt
venv=$PWD/build/trl
if [[ -f $venv/setup.done && $(cat "$venv/setup.done") == "$trl $PWD $(sha256sum <"$lock")" ]]; then exit 0; fi

bash tools/setup_env.sh
echo "setup_trl.sh: installing trl $trl into $venv (1.5 GB)"
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONPATH='' "$venv/bin/python" -m pip install --quiet --no-input --only-binary :all: "$@"; }
torch=$(grep '^torch==' "$lock")
pip --no-deps "$torch" 2>/dev/null || pip --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
pip --constraint "$lock" "trl==$trl"
# Without Triton, stock TRL puts every position of prompt and padding through the output layer, 4.7 times as many as it uses with
# 44-token prompts and 12-token answers. With this line it picks the answers' positions first, as it does on GPUs.
utils=$("$venv/bin/python" -c 'import importlib.util as util; print(util.find_spec("trl").submodule_search_locations[0])')/trainer/utils.py
sed -i 's/^        compact = _use_triton(hidden_states.device)$/        compact = True/' "$utils"
if [[ $(grep -c '^        compact = True$' "$utils") != 1 ]]; then
    echo "setup_trl.sh: error: the line to repair is not in $utils" >&2
    exit 1
fi
echo "$trl $PWD $(sha256sum <"$lock")" >"$venv/setup.done"

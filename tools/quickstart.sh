#!/usr/bin/env bash
# Sets up .venv, makes the model, then trains it and shows what it learned. Arguments are options of the training command:
# bash tools/quickstart.sh seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
.venv/bin/python tools/make_smollm2.py
# On a processor without bfloat16 instructions, bfloat16 takes four times as long as float32.
if [ ! -e /dev/nvidiactl ] && ! grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    echo "quickstart.sh: this processor does not compute in bfloat16: training in float32"
    set -- trainer.dtype=float32 rollout.dtype=float32 "$@"
fi
exec .venv/bin/python -m megatron_aspo train examples/recipes/quickstart.yaml "$@"

#!/usr/bin/env bash
# Runs tools/prove/check_layouts.py with megatron-core 0.19.2 instead of the locked 0.16.1. Arguments go to it:
# bash tools/prove/check_megatron_0.19.sh --only CP2 "EP2 DP2"
# Sets up .venv if needed. The other Megatron, and triton which it imports, are installed in build/megatron-core-0.19.2 (1 GB) and precede
# .venv's packages, which stay unchanged: everything else is the lock's. Made once; remove the directory to make it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
megatron=0.19.2
triton=3.9.0
packages=$PWD/build/megatron-core-$megatron

bash tools/setup_env.sh
if [[ ! -d $packages ]]; then
    echo "check_megatron_0.19.sh: installing megatron-core $megatron and triton $triton into $packages (1 GB)"
    mkdir -p build
    unfinished=$(mktemp -d "$packages.unfinished-XXXX")
    trap 'rm -rf "$unfinished"' EXIT
    # The release declares Python 3.12 as its minimum; it has a wheel for 3.11, which runs.
    PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install --quiet --no-input --no-deps --only-binary :all: \
        --ignore-requires-python --target "$unfinished" "megatron-core==$megatron" "triton==$triton"
    mv -T "$unfinished" "$packages"
fi
export PYTHONPATH=$packages
found=$(.venv/bin/python -c 'import importlib.metadata as metadata; print(metadata.version("megatron-core"))')
if [[ $found != "$megatron" ]]; then
    echo "check_megatron_0.19.sh: error: Python finds megatron-core $found; remove $packages and run this again" >&2
    exit 1
fi
.venv/bin/python tools/prove/check_layouts.py "$@"

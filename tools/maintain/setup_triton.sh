#!/usr/bin/env bash
# Installs Triton beside the environment, in .venv/triton, for the tests of kernels in its interpreter. No-op when it is there.
# It is not in the lock: it would add 0.7 GB, and 70 MB to every trainer and engine process, which on CPU have no use for it; vLLM warns of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=3.7.1 # the version that torch 2.13's CUDA builds require
place=.venv/triton
if [[ -d $place/triton-$version.dist-info ]]; then exit 0; fi

exec 9>.venv.lock
flock 9
if [[ -d $place/triton-$version.dist-info ]]; then exit 0; fi
rm -rf "$place" "$place.unfinished"
PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONPATH='' .venv/bin/python -m pip install --quiet --no-input --no-deps --only-binary :all: \
    --target "$place.unfinished" "triton==$version"
mv "$place.unfinished" "$place"

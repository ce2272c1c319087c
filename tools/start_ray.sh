#!/usr/bin/env bash
# Builds a Ray cluster over the hosts of a hostfile, or of a Slurm, MPI or Kubernetes environment: bash tools/start_ray.sh --help, docs/cluster.md.
#   bash tools/start_ray.sh hostfile --resources trainers=1-2 --resources engines=3-4
# PYTHON=/path/to/python runs the launcher; by default the checkout's .venv, else python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [[ ! -x $python ]]; then python=$(command -v python3) || { echo "start_ray.sh: error: no Python; set PYTHON=/path/to/python" >&2 && exit 2; }; fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m megatron_aspo.launch.start "$@"

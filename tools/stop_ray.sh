#!/usr/bin/env bash
# Ends exactly what tools/start_ray.sh started, on all hosts; idempotent: bash tools/stop_ray.sh --help.
#   bash tools/stop_ray.sh             the last cluster started from here
#   bash tools/stop_ray.sh hostfile    whatever start_ray.sh started on these hosts
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [[ ! -x $python ]]; then python=$(command -v python3) || { echo "stop_ray.sh: error: no Python; set PYTHON=/path/to/python" >&2 && exit 2; }; fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m megatron_aspo.launch.stop "$@"

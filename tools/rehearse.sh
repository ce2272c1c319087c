#!/usr/bin/env bash
# Rehearses the way of an ASPO run on two hosts made of namespaces, by the commands of docs/from_archer.md: Ray, training, evaluation of each
# checkpoint meanwhile, merge, evaluation of the merged model, table. SmolLM2 stands for the model of the paper.
#
#   bash tools/rehearse.sh              code, undisturbed, and again while an engine, a training rank and the driver are each killed once
#   bash tools/rehearse.sh math         mathematics, undisturbed
#   bash tools/rehearse.sh --short      code with a model that is made for it, with the kills only: steps that are done again are compared
#   bash tools/rehearse.sh --keep DIR   keeps what was written in DIR, outside /tmp and the home directory
#
# It needs root and sshd (tools/maintain/setup_hosts.sh), and without --short the model of tools/make_smollm2.py. Commands are printed as they are given. The last line
# is {"minutes", "steps", "checkpoints_evaluated", "evaluated_twice", "kills_survived", "same_table", "wildcard_listeners", "left_processes"};
# status 0 only if all of it is as it should be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m tools.rehearsal "$@"

#!/usr/bin/env bash
# Starts a recipe of examples/recipes on NNODES × GPUS_PER_NODE GPUs. The run_*.sh scripts call it; nothing in it needs to be edited.
#
#   cluster   NNODES, GPUS_PER_NODE (8), and one of: nothing (this machine alone), RAY_ADDRESS=HOST:PORT (a Ray cluster that runs already),
#             HOSTFILE (hosts, one a line, this machine first: tools/start_ray.sh starts Ray on them, with the options START_RAY_ARGS,
#             and tools/stop_ray.sh ends it with the run, unless KEEP_RAY=1)
#   run       MODEL, DATA, EVAL_DATA, REWARD, STEPS: in place of the recipe's; RUN_DIR (runs/NAME); RESUME (auto); MAX_RESTARTS (3): how
#             often a run that died is started again after RESTART_DELAY (10) seconds, with RESUME=auto only
#   layout    TENSOR_PARALLEL, PIPELINE_PARALLEL, ROLLOUT_TENSOR_PARALLEL; data_parallel and engines follow from them and the GPUs
#   sizes     PROMPTS_PER_STEP, RESPONSES_PER_PROMPT, MINI_BATCH_PROMPTS, MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS, MICRO_BATCH_TOKENS,
#             MAX_RUNNING_REQUESTS, KV_CACHE_GIB, EVAL_DRAWS
#
# Arguments are key.path=value overrides of the recipe. With --dry-run among them the run is planned and nothing is started, Ray neither;
# DEVICE=cpu plans for a machine without GPUs, on which GPUS_PER_NODE counts processes.
#
# RESUME=auto begins a run, goes on from its newest checkpoint when the same command is given again, and ends with status 0 when the run is
# done already: one command to start and to requeue. RESUME=never refuses a run directory that exists.
#
# A run whose driver, training rank or node died ends with a status other than 0, 2, 130 and 143, and is started again here. What can be
# cured by the user (2) and a signal to this script (130, 143) end it.
#
# Secrets, such as HF_TOKEN, are read from the environment by the libraries that need them; they are never arguments.
# The exit status is the run's: 0 done, 1 an error, 2 something that you can cure, 130 and 143 interrupted.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "launch.sh: error: $*" >&2
    exit 2
}

whole() { # NAME: fails unless the variable is a whole number from 1
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$1=${!1} is not a whole number from 1; correct it"
}

[[ -n ${RECIPE:-} ]] || fail "RECIPE is empty; start one of examples/run_*.sh, or name a recipe of examples/recipes without .yaml"
: "${NNODES:=1}" "${GPUS_PER_NODE:=8}" "${TENSOR_PARALLEL:=1}" "${PIPELINE_PARALLEL:=1}" "${ROLLOUT_TENSOR_PARALLEL:=1}" "${RESUME:=auto}"
: "${DEVICE:=cuda}" "${MAX_RESTARTS:=3}" "${RESTART_DELAY:=10}"
for name in NNODES GPUS_PER_NODE TENSOR_PARALLEL PIPELINE_PARALLEL ROLLOUT_TENSOR_PARALLEL; do whole "$name"; done
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS is not a whole number from 0; correct it"
[[ $RESTART_DELAY =~ ^[0-9]+$ ]] || fail "RESTART_DELAY=$RESTART_DELAY is not a whole number of seconds; correct it"
[[ $DEVICE == cuda || $DEVICE == cpu ]] || fail "DEVICE=$DEVICE is not known; it is cuda or cpu"

dry_run=
arguments=()
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=1 ;;
        trainer.tensor_parallel=* | trainer.pipeline_parallel=* | rollout.tensor_parallel=*)
            fail "$argument: data_parallel and engines depend on it; set TENSOR_PARALLEL, PIPELINE_PARALLEL or ROLLOUT_TENSOR_PARALLEL" ;;
        trainer.data_parallel=* | trainer.context_parallel=* | rollout.engines=* | placement=*)
            fail "$argument follows from NNODES × GPUS_PER_NODE here; change these, or run megatron-aspo train with the recipe" ;;
        -*) fail "$argument is not an option of this script; it takes --dry-run and key.path=value" ;;
        *=*) arguments+=("$argument") ;;
        *) fail "$argument is not of the form key.path=value" ;;
    esac
done

gpus=$((NNODES * GPUS_PER_NODE))
share=$((TENSOR_PARALLEL * PIPELINE_PARALLEL))
((gpus % share == 0)) ||
    fail "NNODES × GPUS_PER_NODE = $gpus is not a multiple of TENSOR_PARALLEL × PIPELINE_PARALLEL = $share; change one of them"
((GPUS_PER_NODE % ROLLOUT_TENSOR_PARALLEL == 0)) ||
    fail "ROLLOUT_TENSOR_PARALLEL=$ROLLOUT_TENSOR_PARALLEL does not divide GPUS_PER_NODE=$GPUS_PER_NODE; an engine is on one node: lower it"
((GPUS_PER_NODE % TENSOR_PARALLEL == 0)) ||
    fail "TENSOR_PARALLEL=$TENSOR_PARALLEL does not divide GPUS_PER_NODE=$GPUS_PER_NODE; its ranks belong on one node: lower it"
replicas=$((gpus / share))

values=("trainer.tensor_parallel=$TENSOR_PARALLEL" "trainer.pipeline_parallel=$PIPELINE_PARALLEL" "trainer.data_parallel=$replicas"
    "rollout.tensor_parallel=$ROLLOUT_TENSOR_PARALLEL" "rollout.engines=$((gpus / ROLLOUT_TENSOR_PARALLEL))" "resume=$RESUME")
# What one rank cannot shard is refused by the command: it would have no effect.
((replicas > 1)) || values+=("trainer.distributed_optimizer=false")
((TENSOR_PARALLEL > 1)) || values+=("trainer.sequence_parallel=false")
take() { # VARIABLE KEY: an override, if the variable is set
    if [[ -n ${!1:-} ]]; then values+=("$2=${!1}"); fi
}
take MODEL model
take DATA data.path
take EVAL_DATA data.eval_path
take REWARD data.reward
take STEPS steps
take RUN_DIR run_dir
take PROMPTS_PER_STEP rollout.prompts_per_step
take RESPONSES_PER_PROMPT rollout.responses_per_prompt
take MINI_BATCH_PROMPTS algorithm.mini_batch_prompts
take MAX_PROMPT_TOKENS data.max_prompt_tokens
take MAX_RESPONSE_TOKENS rollout.max_response_tokens
take MICRO_BATCH_TOKENS trainer.micro_batch_tokens
take MAX_RUNNING_REQUESTS rollout.max_running_requests
take KV_CACHE_GIB rollout.kv_cache_gib
take EVAL_DRAWS evaluation.draws
recipe=$root/examples/recipes/$RECIPE.yaml
values+=(${arguments[@]+"${arguments[@]}"})

command=$(command -v megatron-aspo || true)
[[ -n $command ]] || command=$root/.venv/bin/megatron-aspo
[[ -x $command ]] || fail "megatron-aspo is not on PATH; activate its environment (bash tools/setup_env.sh makes one)"

if [[ -n $dry_run ]]; then
    exec "$command" plan "$recipe" --device "$DEVICE" "${values[@]}"
fi

child=
stopped=
run() { # ARGUMENT…: the run, in order at a signal, and again while it dies; ends this script with its status
    local status restarts=0
    # The run ends in order at a signal; this script waits for it.
    trap 'stopped=1; if [[ -n $child ]]; then kill -TERM "$child" || true; fi' TERM
    trap 'stopped=1; if [[ -n $child ]]; then kill -INT "$child" || true; fi' INT
    while :; do
        "$command" train "$recipe" "$@" "${values[@]}" &
        child=$!
        while :; do # a signal ends wait, but not yet the run
            status=0
            wait "$child" || status=$?
            kill -0 "$child" 2>/dev/null || break
        done
        child=
        case $status in 0 | 2 | 130 | 143) exit "$status" ;; esac
        if [[ -n $stopped || $RESUME != auto ]] || ((restarts == MAX_RESTARTS)); then exit "$status"; fi
        restarts=$((restarts + 1))
        echo "launch.sh: the run ended with status $status; starting it again from its newest checkpoint, $restarts of $MAX_RESTARTS times" >&2
        sleep "$RESTART_DELAY"
        if [[ -n $stopped ]]; then exit "$status"; fi
    done
}

if [[ -n ${RAY_ADDRESS:-} ]]; then
    [[ $RAY_ADDRESS =~ :[0-9]+$ ]] || fail "RAY_ADDRESS=$RAY_ADDRESS is not of the form HOST:PORT; name the head node and its port"
    run --ray-address "$RAY_ADDRESS"
fi
if [[ -z ${HOSTFILE:-} ]]; then
    ((NNODES == 1)) || fail "NNODES=$NNODES, but neither RAY_ADDRESS (HOST:PORT) nor HOSTFILE is set; set one of them"
    run
fi

[[ -r $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE cannot be read"
hosts=$(grep -cvE '^[[:space:]]*(#|$)' "$HOSTFILE" || true)
((hosts >= NNODES)) || fail "HOSTFILE=$HOSTFILE names $hosts hosts, fewer than NNODES=$NNODES; add hosts, or lower NNODES"
# shellcheck disable=SC2086  # START_RAY_ARGS are several words
said=$(bash "$root/tools/start_ray.sh" "$HOSTFILE" ${START_RAY_ARGS:-} | tee >(cat >&2))
address=$(grep -oE -- '--ray-address [^ ]+' <<<"$said" | tail -n 1 | cut -d ' ' -f 2 || true)
[[ $address =~ :[0-9]+$ ]] || fail "start_ray.sh named no --ray-address HOST:PORT; see its output above"
token=$(grep -oE 'RAY_AUTH_TOKEN_PATH=[^ ]+' <<<"$said" | tail -n 1 | cut -d = -f 2 || true)
if [[ -n $token ]]; then export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token; fi
state=$(grep -oE 'stop_ray.sh --dir [^ ]+' <<<"$said" | tail -n 1 | cut -d ' ' -f 3 | tr -d "'" || true)
[[ -n $state ]] || fail "start_ray.sh did not say how the cluster is stopped; see its output above, and stop it"
# shellcheck disable=SC2329  # called by the trap
stop() { # the cluster ends with the run, however that ends
    [[ -z ${KEEP_RAY:-} ]] || return 0
    bash "$root/tools/stop_ray.sh" --dir "$state" >&2 || echo "launch.sh: the Ray cluster at $address could not be stopped: see above" >&2
}
trap stop EXIT
run --ray-address "$address"

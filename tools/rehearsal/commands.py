"""What a user types, as shell text: the commands of docs/from_archer.md with the sizes of a laptop."""

from dataclasses import dataclass
from pathlib import Path

HEAD, OTHER = 1, 2
"""Hosts: the first trains and grades; the second has the reward workers, and generates for evaluations."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a rehearsal."""

    ranks: int
    """Training ranks, one on each pipeline stage, and as many engines. By tensor parallelism SmolLM2's 9 heads could not be shared by 2."""
    steps: int
    checkpoint_every: int
    test_problems: int
    samples: int
    """Responses to each test problem."""
    prompts: int
    """Prompts of a step; the mini-batch has half of them."""
    responses: int
    """Responses to each prompt in training."""
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Subject:
    """Code or mathematics."""

    script: str
    """Of `examples/`; its run has the same name."""
    task: str
    """Name of the test set."""
    prepare: str
    """Words of tools/prepare_data.py for the training data."""
    prepare_test: str
    """For the test set; empty where its file is read as it is."""
    training: str
    """Values that replace the recipe's, beside sizes."""
    evaluation: str
    """Values that replace the protocol's, beside sizes."""
    lcb: bool
    """Whether tools/run_lcb_eval.sh grades it."""

    @property
    def name(self) -> str:
        return self.script.removeprefix("run_").removesuffix(".sh")


SUBJECTS = {
    "code": Subject(
        "run_aspo_qwen2.5_1.5b_code.sh",
        "livecodebench_v5",
        "livecodebench raw/train.jsonl",
        "livecodebench_v5 raw/test.jsonl --any-count",
        " data.code.limits.cpu_s=2 data.code.limits.wall_s=60",
        # The endless loops of a small model would take the protocol's 150 s each.
        " data.code.limits.cpu_s=5 data.code.limits.wall_s=60",
        lcb=True,
    ),
    "math": Subject("run_aspo_qwen2.5_1.5b_math.sh", "aime24", "archer_math raw/train.json", "", "", "", lcb=False),
}


@dataclass(frozen=True)
class Commands:
    """The commands of one rehearsal. Each is given in the checkout."""

    subject: Subject
    sizes: Sizes
    model: Path
    data: Path
    """Directory with `raw/`, `train.jsonl` and `test/`."""
    place: Path
    """Directory of this rehearsal."""
    hostfile: Path
    ssh_options: str

    @property
    def runs(self) -> Path:
        """MODEL_ROOT."""
        return self.place / "runs"

    @property
    def run(self) -> Path:
        return self.runs / self.subject.name

    @property
    def merged(self) -> Path:
        return self.place / "merged"

    def prepare(self) -> list[str]:
        """Return the commands that make training and test data."""
        made = [(self.subject.prepare, "train"), (self.subject.prepare_test, f"test/{self.subject.task}")]
        words = [(kind.replace("raw/", f"{self.data}/raw/"), f"{self.data}/{name}.jsonl") for kind, name in made if kind]
        return [f"python tools/prepare_data.py {kind} --to {target}" for kind, target in words]

    def show(self) -> str:
        """Return the command that shows what was understood of the data."""
        reward = "code" if self.subject.lcb else "math"
        files = f"{self.data}/train.jsonl --held-out {self.data}/test/{self.test_file}"
        return f"megatron-aspo data {files} --model {self.model} --reward {reward}"

    def start_ray(self) -> str:
        options = "--resources trainers=1 --resources graders=2 --num-cpus 2 --object-store-mb 100 --export PYTHONPATH"
        return f'bash tools/start_ray.sh {self.hostfile} {options} --ssh-options "{self.ssh_options}"'

    def stop_ray(self) -> str:
        return "bash tools/stop_ray.sh"

    def plan(self) -> str:
        return f"DEVICE=cpu {self.train('', '')} --dry-run"

    def train(self, address: str, token: str) -> str:
        s = self.sizes
        variables = {
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": token,
            "WANDB_MODE": "offline",
            "MODEL": self.model,
            "DATA": f"{self.data}/train.jsonl",
            "EVAL_DATA": f"{self.data}/test/{self.test_file}",
            "RUN_DIR": self.run,
            "RESTART_DELAY": 1,
            "GPUS_PER_NODE": s.ranks,
            "PIPELINE_PARALLEL": s.ranks,
            "STEPS": s.steps,
            "PROMPTS_PER_STEP": s.prompts,
            "RESPONSES_PER_PROMPT": s.responses,
            "MINI_BATCH_PROMPTS": s.prompts // 2,
            "MAX_PROMPT_TOKENS": s.prompt_tokens,
            "MAX_RESPONSE_TOKENS": s.response_tokens,
            "MICRO_BATCH_TOKENS": 3 * s.prompt_tokens,
            "MAX_RUNNING_REQUESTS": 32,
            "KV_CACHE_GIB": 0.25,
            "EVAL_DRAWS": 1,
        }
        values = [
            "deterministic=true trainer.dtype=float32 rollout.dtype=float32",
            "trainer.threads=1 rollout.threads=1 trainer.recompute=none trainer.shared_prompts=true",
            "optimizer.lr=1e-5 optimizer.warmup_steps=1 transfer_bucket_mib=32",
            f"trainer.resource=trainers data.reward_resource=graders data.reward_workers=2{self.subject.training}",
            f"checkpoint.every={s.checkpoint_every} checkpoint.keep_last=0",
            "'observe.trackers=[tensorboard,wandb]' observe.project=aspo",
        ]
        settings = " ".join(f"{name}={value}" for name, value in variables.items())
        return f"{settings} bash examples/{self.subject.script} {' '.join(values)}"

    @property
    def test_file(self) -> str:
        return f"{self.subject.task}.{'jsonl' if self.subject.prepare_test else 'json'}"

    def _settings(self) -> str:
        s = self.sizes
        sizes = f"samples={s.samples} max_response_tokens={s.response_tokens} data.max_prompt_tokens={s.prompt_tokens}"
        return f"{sizes} deterministic=true{self.subject.evaluation}"

    def _evaluation(self) -> str:
        return f"WANDB_MODE=offline DATA_DIR={self.data}/test TASKS={self.subject.task} ACCEPT_COUNT=1 POLL_S=10"

    def generate(self) -> str:
        """Return the pipeline's command on the host that generates."""
        script = f"TARGET_DIRS={self.subject.name} STAGE=generate bash tools/run_eval_pipeline.sh {self.runs}"
        return f"{self._evaluation()} {script} {self._settings()} engine.threads=1"

    def grade(self) -> str:
        """Return the pipeline's command on the host that grades."""
        script = "run_lcb_eval.sh" if self.subject.lcb else "run_eval_pipeline.sh"
        return f"{self._evaluation()} STAGE=grade bash tools/{script} {self.runs} {self._settings()}"

    def merge(self) -> str:
        return f"bash tools/model_merge.sh {self.run}/checkpoints/step_{self.sizes.steps} {self.merged}"

    def evaluate_merged(self) -> str:
        words = f"bash tools/run_eval.sh {self.merged} {self.subject.task} {self._settings()} engine.threads=1"
        return f"DATA_DIR={self.data}/test ACCEPT_COUNT=1 {words}"

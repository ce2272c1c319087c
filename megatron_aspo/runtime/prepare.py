"""The first step of a run: everything that can be checked and read before its processes start, in order of cost."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_aspo.checkpoint.torch_dist import TorchDistReader
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.hf.model import HFModel, read_model
from megatron_aspo.hf.tensor_file import sha256_of_parts
from megatron_aspo.hf.tensor_files import TensorReader
from megatron_aspo.observe.trackers import check_packages
from megatron_aspo.rewards.process import check_reward
from megatron_aspo.runtime.checks import CheckedRecipe, check_run, expected_device
from megatron_aspo.runtime.machine import check_can_be_made
from megatron_aspo.runtime.plan import Plan, check_room
from megatron_aspo.runtime.start import Start, find_start
from megatron_aspo.tasks.task import Task, build_task
from megatron_aspo.trainer.settings import RankSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FINGERPRINT_PROMPTS = 256
"""Number of prompts in a checkpoint's fingerprint of the data. A finite set adds a digest of all its prompts."""


@dataclass(frozen=True)
class Prepared:
    """A run that can start."""

    config: Config
    start: Start
    checked: CheckedRecipe
    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str
    """Text of the template that `data.chat_template` names, read at the start; empty if it names none."""
    task: Task
    identity: dict[str, Any]
    """Values that a resumed run must have in common with the one that wrote its checkpoint."""
    remarks: tuple[str, ...]
    """Lines about the data that are printed before the run."""

    @property
    def model(self) -> HFModel:
        return self.checked.model

    @property
    def settings(self) -> RankSettings:
        return self.checked.settings


def prepare(config: Config) -> Prepared:
    """Check a recipe, its model and its data, and find where the run starts.

    Nothing is left running or written. Raises UserError with the rule and the cure. `plan` does the part without data (`check_run`).
    """
    start = find_start(config)
    check_packages(config.observe.trackers)
    checked = check_run(config, device := expected_device(config))
    if device == "cpu":
        check_room(Plan(config, checked.model, checked.settings, device))
    if not start.in_place:
        check_can_be_made(config.directory)
    tokenizer = load_tokenizer(checked.model.directory)
    encoder = PromptEncoder(tokenizer, checked.model.dims.vocab, config.data)
    task = build_task(config.task, config.data, encoder, config.seed)
    # The reward workers of a cluster to join may live elsewhere; they load the reward before anything else.
    if (config.data.reward or config.data.rewards) and not config.ray_address:
        check_reward(config.task, config.data)
    assert checked.reader is not None  # check_run required weights
    identity = _identity(config, task, checked.reader)
    _check_identity(start, config, identity, checked.model)
    if config.evaluation.draws:
        _check_held_out(task.held_out())
    remarks = tuple(filter(None, (encoder.remark, *task.remarks)))
    return Prepared(config, start, checked, tokenizer, encoder.given_template, task, identity, remarks)


def _identity(config: Config, task: Task, reader: TensorReader | TorchDistReader) -> dict[str, Any]:
    """Return digests of the prompts in order and of the model's small tensors, with the values that determine the order."""
    digest = hashlib.sha256()
    vectors = [(name, home) for name in reader.dtypes for home in reader.homes(name) if len(home) == 1]
    model = sha256_of_parts(tensor for _, _, tensor in reader.read(vectors))
    for number in range(_FINGERPRINT_PROMPTS):
        prompt = task.prompt(number)
        digest.update(f"{prompt.id} {list(prompt.token_ids)}\n".encode())
    digest.update(task.data_sha256.encode())
    return {"seed": config.seed, "task": config.task, "prompts_sha256": digest.hexdigest(), "model_sha256": model}


def _check_identity(start: Start, config: Config, identity: dict[str, Any], model: HFModel) -> None:
    """Raise UserError if the checkpoint to resume from, if any, is of another run or model."""
    checkpoint = start.checkpoint
    if checkpoint is None:
        return
    if start.step > config.steps:
        raise UserError(f"{checkpoint} is after step {start.step}, but steps={config.steps}; raise it, or resume from an earlier one")
    other_model = UserError(f"{checkpoint} is of another model than {model.directory}; resume with the model that the run began with")
    for key, value in identity.items():
        saved = start.training[key]
        if saved == value:
            continue
        if key == "model_sha256":
            raise other_model
        what = "the prompts or their tokens are others" if key == "prompts_sha256" else f"{key} was {saved}, the recipe says {value}"
        raise UserError(f"{checkpoint}: {what}: prompts would be lost or doubled; resume with what the run began with")
    saved = read_model(checkpoint / "huggingface")
    if (saved.architecture, saved.dims) != (model.architecture, model.dims):
        raise other_model


def _check_held_out(prompts: list) -> None:
    if len(prompts) < 2:
        raise UserError(f"there are {len(prompts)} held-out prompts; a standard error needs at least 2, or set evaluation.draws=0")

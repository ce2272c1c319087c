"""Train one of this project's tasks with TRL's GRPO: the other side of bench_end_to_end.py, which runs it in TRL's own environment.

    build/trl/bin/python tools/bench/trl_peer.py '{"model": …, "seed": 0, "steps": 10, …}'

Prints a JSON line when training begins and one after every step: seconds of training so far (evaluations left out), held-out accuracy,
tokens generated.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.tasks.options import DataOptions
from megatron_aspo.tasks.task import build_reward, build_task


def report(**values) -> None:
    print(json.dumps(values), flush=True)


class Clock(TrainerCallback):
    """Reports how training goes, and pauses the clock while held-out prompts are answered."""

    def __init__(self, task, score, tokenizer, draws: int, temperature: float, max_tokens: int):
        self.task, self.score, self.tokenizer = task, score, tokenizer
        self.sampling = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "max_new_tokens": max_tokens,
            "num_return_sequences": draws,
        }
        self.trainer: GRPOTrainer | None = None
        self.evaluating = 0.0
        self.tokens = 0

    def on_train_begin(self, *args, **kwargs):
        report(event="begin")
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.begun - self.evaluating
        started = time.perf_counter()
        accuracy = self.accuracy()
        self.evaluating += time.perf_counter() - started
        report(step=state.global_step, seconds=seconds, accuracy=accuracy, tokens=self.tokens)

    @torch.no_grad()
    def accuracy(self) -> float:
        prompts, rewards = self.task.held_out(), []
        model = self.trainer.model
        model.eval()
        for prompt in prompts:
            ids = torch.tensor([prompt.token_ids])
            with torch.autocast("cpu", torch.bfloat16, enabled=self.trainer.args.bf16):
                rows = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **self.sampling)
            texts = self.tokenizer.batch_decode(rows[:, ids.shape[1] :], skip_special_tokens=True)
            rewards += [self.score(prompt, text).score for text in texts]
        model.train()
        return sum(rewards) / len(rewards)


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    options = DataOptions(**settings["data"])
    task = build_task(settings["task"], options, PromptEncoder(tokenizer, len(tokenizer), options), settings["seed"])
    score = build_reward(settings["task"], options)
    prompts, group = settings["prompts"], settings["responses"]
    count = prompts * settings["steps"]
    rows = [{"prompt": [{"role": "user", "content": task.prompt(i).text}], "index": i} for i in range(count)]
    clock = Clock(task, score, tokenizer, settings["draws"], settings["temperature"], settings["max_tokens"])

    def reward(completions, index, completion_ids, **kwargs) -> list[float]:
        clock.tokens += sum(map(len, completion_ids))
        texts = [completion[0]["content"] for completion in completions]
        return [score(task.prompt(i), text).score for i, text in zip(index, texts, strict=True)]

    config = GRPOConfig(
        output_dir=settings["output"],
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=prompts * group // settings["micro_batch"] // settings["updates"],
        generation_batch_size=prompts * group,
        num_generations=group,
        max_completion_length=settings["max_tokens"],
        temperature=settings["temperature"],
        max_steps=settings["steps"] * settings["updates"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.0,
        loss_type="bnpo",  # mean over the counted tokens of the batch: token_mean here
        bf16=settings["dtype"] == "bfloat16",
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        shuffle_dataset=False,
        gradient_checkpointing=False,
        seed=settings["seed"],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()

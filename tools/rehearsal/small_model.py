"""A model of one token a byte, and problems that it solves about half of the time, for a rehearsal that loads no pretrained model.

Each problem asks for one of two programs. The model is taught both as the answer to every problem, so that it gives either.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from tests.tokenizers import byte_tokenizer

SUMMANDS = (1, 2)
"""Each problem asks for x plus one of them."""
_ANSWER = "```python\nclass Solution:\n    def answer(self, x):\n        return x + {}\n```"
_SEED = 33
_STEPS, _BATCH = 300, 2


def problems(name: str, count: int) -> list[dict[str, Any]]:
    """Return rows like those of examples/data/laptop_code_train.jsonl, with ids that begin with `name`; no two ask the same question."""
    rows = []
    for number in range(count):
        summand = SUMMANDS[number % len(SUMMANDS)]
        given = [number + 2, number + 3, number + 5, number + 7]
        question = f"Write a Python function `answer(x)` that returns x plus {summand}. ({name} {number})"
        truth = {"fn_name": "answer", "inputs": [[x] for x in given], "outputs": [x + summand for x in given]}
        rows.append({"id": f"{name}_{number}", "prompt": [{"role": "user", "content": question}], "ground_truth": truth})
    return rows


def save_small_model(directory: Path, prompts: Sequence[list[dict[str, str]]]) -> None:
    """Save a Llama with two layers and its tokenizer in `directory`, trained to answer these conversations with either program."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.set_num_threads(1)  # two threads wait for each other longer than they compute
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    examples = [_example(tokenizer, prompt, _ANSWER.format(summand)) for prompt in prompts for summand in SUMMANDS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, _STEPS)
    for step in range(_STEPS):
        batch = [examples[(step * _BATCH + n) % len(examples)] for n in range(_BATCH)]
        tokens = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in batch], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = tokens.clone()
        for row, (ids, prompt) in enumerate(batch):
            labels[row, :prompt], labels[row, len(ids) :] = -100, -100
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _example(tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]], answer: str) -> tuple[torch.Tensor, int]:
    """Return the token ids of a conversation with its answer, and the number of them before the answer."""
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(asked + answer, add_special_tokens=False)["input_ids"]
    return torch.tensor([*ids, tokenizer.eos_token_id]), len(tokenizer(asked, add_special_tokens=False)["input_ids"])

"""`megatron-aspo data`: reports how a recipe's data, or a file, is understood."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.config import load_optional
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.store import PromptStore, with_answer
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.hf.model_directory import resolve_model
from megatron_aspo.rewards.by_source import reward_of_source
from megatron_aspo.rewards.choice import RewardChoice
from megatron_aspo.tasks.dataset import EVAL, TRAIN, Loader, Part, find_repetitions
from megatron_aspo.tasks.options import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_SHOWN = 2000
"""Characters of a prompt or ground truth that are printed."""
_QUANTILES = (("shortest", 0.0), ("median", 0.5), ("95 %", 0.95), ("longest", 1.0))


def run_data(parsed: argparse.Namespace) -> None:
    """Print the report on `parsed.locations`, or on the recipe's data. Raises UserError for the first faulty row."""
    model, options = parsed.model, DataOptions(drop_long_prompts=True)
    if config := load_optional(parsed.recipe, parsed.overrides):
        model, options = model or config.model, config.data
    options = replace(options, path=parsed.locations or options.path, eval_path=parsed.held_out or options.eval_path)
    if parsed.reward:
        options = replace(options, reward=parsed.reward)
    if not options.path:
        raise UserError("there is no data; name files, or a recipe with data.path by --recipe")
    if not model:
        raise UserError("prompts are shown as a model gets them; name it with --model, or a recipe with --recipe")
    directory = resolve_model(model)
    tokenizer = load_tokenizer(directory)
    encoder = PromptEncoder(tokenizer, _vocab(directory), options)
    store = PromptStore()
    loader = Loader(store, options, encoder)
    splits = {TRAIN: loader.load(TRAIN, options.path), EVAL: loader.load(EVAL, options.eval_path)}
    if parsed.json:
        print(json.dumps(_report_as_json(store, splits, options)))
    else:
        print("\n".join(_format_report(store, splits, options, tokenizer, parsed.prompts)))


def _vocab(directory: Path) -> int:
    """Return the rows of the model's embedding; a run refuses larger token ids."""
    try:
        return int(json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}/config.json has no readable vocab_size ({one_line(error)}); name the directory of a model") from error


def _format_report(
    store: PromptStore, splits: dict[str, list[Part]], options: DataOptions, tokenizer: "PreTrainedTokenizerBase", shown: int
) -> list[str]:
    report = _report_as_json(store, splits, options)
    lines = []
    for split, parts in report["splits"].items():
        lines.append(f"{'training' if split == TRAIN else 'held-out'} prompts: {sum(part['prompts'] for part in parts)}")
        for part in parts:
            left_out = (
                f", {part['too_long']} longer than data.max_prompt_tokens={options.max_prompt_tokens} left out" if part["too_long"] else ""
            )
            share = f", {part['weight']:.3g} of the draws" if part["weight"] else ""
            lines.append(f"  {part['location']}: {part['prompts']}{left_out}{share}")
            lengths = ", ".join(f"{name} {value}" for name, value in part["tokens"].items())
            lines.append(f"    tokens of a prompt: {lengths}")
            for source in part["sources"]:
                lines.append(
                    f"    data_source {source['name']}: {source['prompts']}; reward: {source['reward'] or 'none, set data.reward'}"
                )
    lines += report["repetitions"] or ["no prompt occurs twice, and none is both trained on and held out"]
    for number in range(min(shown, len(store))):
        lines += _format_prompt(store, number * len(store) // shown, tokenizer)
    return lines


def _report_as_json(store: PromptStore, splits: dict[str, list[Part]], options: DataOptions) -> dict[str, Any]:
    """Return the report as JSON values."""
    weights = [weight / sum(options.weights) for weight in options.weights]
    return {
        "splits": {
            split: [
                _describe_part(store, part, options, weights[n] if weights and split == TRAIN else None) for n, part in enumerate(parts)
            ]
            for split, parts in splits.items()
            if parts
        },
        "repetitions": find_repetitions(store),
    }


def _describe_part(store: PromptStore, part: Part, options: DataOptions, weight: float | None) -> dict[str, Any]:
    inside = "WHERE position >= ? AND position < ?"
    lengths = [n // 4 for (n,) in store.query(f"SELECT length(tokens) AS n FROM prompts {inside} ORDER BY n", part.start, part.stop)]
    sources = store.query(
        f"SELECT data_source, count(*) FROM prompts {inside} GROUP BY data_source ORDER BY count(*) DESC, data_source",
        part.start,
        part.stop,
    )
    return {
        "location": part.location,
        "prompts": part.stop - part.start,
        "too_long": part.too_long,
        "weight": weight,
        "tokens": {name: _quantile(lengths, share) for name, share in _QUANTILES},
        "sources": [{"name": name, "prompts": count, "reward": _describe_reward(options, name)} for name, count in sources],
    }


def _quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[round(share * (len(ordered) - 1))]


def _format_prompt(store: PromptStore, position: int, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    prompt = with_answer(store.read(position))
    ((source,),) = store.query("SELECT location FROM prompts WHERE position = ?", position)
    text = cast(str, tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False))
    truth = json.dumps(prompt.ground_truth, ensure_ascii=False, default=repr)
    return [f"--- prompt {prompt.id}, {source}, {len(prompt.token_ids)} tokens", _shorten(text), f"--- ground truth: {_shorten(truth)}"]


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} … ({len(text)} characters)"


def _describe_reward(options: DataOptions, data_source: str) -> str:
    """Return the reward of a data source in words; empty if it has none."""
    choice = RewardChoice(options)
    if not choice:
        return reward_of_source(data_source)
    parts = choice.parts(data_source)
    return next(iter(parts)) if len(parts) == 1 else " + ".join(f"{weight:g} × {name}" for name, weight in parts.items())

#!/usr/bin/env python
"""Write docs/metrics.md: every name in metrics.jsonl with its unit and its meaning, in sections that say when their names are present.

    python tools/maintain/make_metrics_doc.py

The names come from the code (metric_names.py), the descriptions from the table below. A name without a description stops the tool, and
so does a description of a name that the code does not produce. A test checks that the page is current.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from metric_names import ROOT, metric_names

PAGE = ROOT / "docs" / "metrics.md"
HEADER = """# Metrics

<!-- Written by tools/maintain/make_metrics_doc.py; do not edit. -->

`metrics.jsonl` in the run directory has one flat JSON object per step; `step` is the step's number, from 0. A line is on the disk before
the next step begins, and every value is a finite number. Names are present in every step unless their section says when.

A step that trained on nothing (all groups dropped) has no `train/…` means, no `mismatch/…` and no `packing/…`; a run whose `train/updates`
stay 0 changes no weight. [troubleshooting.md](troubleshooting.md) says which names to look at for which symptom. After a resume, the lines
of steps that are done again are moved to `metrics.superseded.jsonl`.

Notation as in [losses.md](losses.md): A is the advantage, w the weight of a token's policy gradient, r the ratio π / π_old. "Positive" and
"negative" are tokens with A > 0 and A < 0. Means over tokens are over counted response tokens, of all updates of the step.

The page is written by `python tools/maintain/make_metrics_doc.py`, and a test compares its names with those that the code can produce.
"""
SECTIONS = {
    "reward": ("Rewards", "Of every response of the step, before any group is filtered."),
    "response": ("Responses", "Of every response of the step, before any group is filtered."),
    "groups": ("Groups", "A group is all responses to one prompt."),
    "train": (
        "Training",
        "From the training ranks. Present in steps with an update; `…/positive` and `…/negative` need tokens of that sign too. Always "
        "present: `train/updates`, `train/skipped_updates` and `train/learning_rate`.",
    ),
    "mismatch": (
        "Engine against trainer",
        "How far the log-probabilities of the trainer and of the engine differ for the same tokens and weights. It is rounding "
        "unless something is wrong. In the whole-run tests, in float32, it stays below 1e-4; in a bfloat16 quickstart its mean was 0.005 "
        "to 0.041 per step and its maximum 0.20 to 0.75. Present in steps with a trained response.",
    ),
    "packing": ("Packing", "How full and how even the packed micro-batches were. Present in steps with an update."),
    "staleness": ("Staleness", "How old the weights were that sampled the responses."),
    "tokens": ("Tokens", "Counts and speeds."),
    "weights": ("Weight sync", "See [weight_sync.md](weight_sync.md)."),
    "seconds": ("Seconds", "Wall time of the phases of the step."),
    "evaluation": (
        "Evaluation",
        "On the held-out prompts; see [recipes.md](recipes.md#evaluation). Present in every `evaluation.every`-th step but the last; "
        "`evaluations/step_N.json` has the results before and after training too.",
    ),
}
SIGN = {"positive": "A > 0", "negative": "A < 0"}
WORDS = {
    "reward/mean": ("reward", "Mean reward."),
    "reward/max": ("reward", "Largest reward."),
    "reward/min": ("reward", "Smallest reward."),
    "reward/shaped_mean": ("reward", "Mean reward after the length penalty (`algorithm.overlong_buffer_tokens`)."),
    "reward/timeouts": ("responses", "Responses on which the reward took longer than `data.reward_timeout_s`, or its worker froze twice."),
    "reward/crashes": ("responses", "Responses on which the reward ended its process twice, or its worker died twice."),
    "reward/errors": ("responses", "Responses on which the reward raised or returned no number; only with `data.reward_on_error: score`."),
    "reward/part/NAME": (
        "reward",
        "Mean score, unweighted, of the part NAME of a mixed reward (`data.rewards`), or of a number in the `parts` of a custom reward's "
        "details, over the responses that have it.",
    ),
    "reward/worker_restarts": ("workers", "Reward workers that died or froze and were replaced."),
    "response/length_mean": ("tokens", "Mean length of a response."),
    "response/length_max": ("tokens", "Length of the longest response."),
    "response/cut_off_share": ("share", "Responses that were truncated at `rollout.max_response_tokens`."),
    "response/repetition_share": ("share", "Mean share of a response's 20-grams of lower-cased words that occur more than once."),
    "response/repetition_top_count": ("count", "Occurrences of the most frequent 20-gram in any one response."),
    "groups/total": ("groups", "Groups that were generated, replacements included."),
    "groups/solved_by_all": ("groups", "Groups in which every reward is above 0."),
    "groups/solved_by_none": ("groups", "Groups in which no reward is above 0."),
    "groups/dropped": ("groups", "Groups that `algorithm.group_filter` left out of training."),
    "groups/resampled": ("groups", "Groups generated to replace others (`group_filter: resample`)."),
    "groups/missing": ("groups", "Groups still missing when `algorithm.resample_rounds` was reached."),
    "train/entropy": ("nats", "Mean entropy of the policy at the response tokens."),
    "train/rollout_correction/weight": ("factor", "Mean factor that the rollout correction applied; 1 without one."),
    "train/rollout_correction/share": ("share", "Tokens that the rollout correction bounded (`tis`) or dropped (`mask`)."),
    "train/kl": ("nats", "Mean KL estimate against the reference policy; only with `algorithm.kl_coef` above 0."),
    "train/kl_penalty": ("reward", "Mean KL penalty subtracted from a response's reward; only with `algorithm.kl_in: reward`."),
    "train/weight_distance": ("factor", "Mean of \\|w − 1\\| over tokens with A ≠ 0: how far the updates were from on-policy."),
    "train/loss": ("loss", "Mini-batch loss, mean over the updates."),
    "train/policy_loss": ("loss", "The policy term of the loss, rollout correction included, mean over the updates."),
    "train/updates": ("updates", "Optimizer steps taken, skipped ones included."),
    "train/skipped_updates": ("updates", "Optimizer steps that Megatron did not apply."),
    "train/learning_rate": ("rate", "Learning rate of the step."),
    "train/gradient_norm": ("norm", "Mean global gradient norm before clipping."),
    "train/gradient_norm_max": ("norm", "Largest global gradient norm before clipping."),
    "mismatch/mean": ("nats", "Mean of the absolute difference."),
    "mismatch/max": ("nats", "Largest absolute difference."),
    "mismatch/k3": ("nats", "Mean of exp(d) − 1 − d, d the difference: an estimate of the KL divergence."),
    "packing/fill": ("share", "Tokens read over the room for them; above 1 only with samples over `trainer.micro_batch_tokens`."),
    "packing/imbalance": ("factor", "Work of the fullest data-parallel rank over the mean; the step takes this factor longer."),
    "packing/lockstep_imbalance": ("factor", "The same if ranks waited for each other at every micro-batch, as with experts."),
    "staleness/mean": ("versions", "Mean over response tokens of the age of the weights that sampled them; 0 in synchronous training."),
    "tokens/generated": ("tokens", "Response tokens generated."),
    "tokens/trained": ("tokens", "Tokens trained on in all passes; a prompt counts once for each of its responses."),
    "tokens/generated_per_s": ("tokens/s", "`tokens/generated` over `seconds/generate`."),
    "tokens/trained_per_s": ("tokens/s", "`tokens/trained` over `seconds/update`."),
    "weights/bytes_sent": ("bytes", "Weight bytes that the training ranks sent to the engines; 0 when no update was made."),
    "seconds/generate": ("s", "Generation: until the last response is finished. Responses are scored meanwhile."),
    "seconds/reward": ("s", "What scoring adds: from the last response until the last score."),
    "seconds/logprobs": ("s", "Old and reference log-probabilities, and advantages."),
    "seconds/update": ("s", "Forward, backward and optimizer steps of all mini-batches."),
    "seconds/publish": ("s", "Weight sync, with `placement: colocated` the moves of memory too."),
    "seconds/step": ("s", "The whole step, without evaluation and checkpoint."),
    "evaluation/accuracy": ("reward", "Mean reward over all draws of all held-out prompts."),
    "evaluation/standard_error": ("reward", "Standard error of that mean, over prompts."),
}
"""Name → (unit, meaning). Names that end in a sign are below."""
BY_SIGN = {
    "train/weight": ("factor", "Mean w of tokens with {}; where the gradient is cut, w counts as the bound."),
    "train/weight_distance": ("factor", "Mean of \\|w − 1\\| of tokens with {}."),
    "train/ratio": ("factor", "Mean r of tokens with {}."),
    "train/hard_mask_share": ("share", "Tokens with {} whose gradient the policy loss sets to 0."),
    "train/soft_cap_share": ("share", "Tokens with {} whose weight the dual clip bounds."),
}


def words(name: str) -> tuple[str, str]:
    """Return unit and meaning of a name. Raises LookupError for a name without a description."""
    stem, _, sign = name.rpartition("/")
    if sign in SIGN and stem in BY_SIGN:
        unit, meaning = BY_SIGN[stem]
        return unit, meaning.format(SIGN[sign])
    if name not in WORDS:
        raise LookupError(f"the metric {name} has no words: describe it in WORDS of tools/maintain/make_metrics_doc.py")
    return WORDS[name]


def page() -> str:
    """Return the whole page."""
    names = metric_names()
    contents = [f"- [{title}](#{title.lower().replace(' ', '-')})\n" for title, _ in SECTIONS.values()]
    parts = [HEADER, "\n", *contents]
    for prefix, (title, text) in SECTIONS.items():
        rows = [f"| `{name}` | {' | '.join(words(name))} |\n" for name in names if name.partition("/")[0] == prefix]
        parts.append(f"\n## {title}\n\n{text}\n\n| name | unit | meaning |\n|---|---|---|\n{''.join(rows)}")
    if unused := sorted((WORDS.keys() | BY_SIGN.keys()) - {*names, *(name.rpartition("/")[0] for name in names)}):
        raise LookupError(f"no metric has the names {unused}: remove their words from tools/maintain/make_metrics_doc.py")
    # The page's introduction has `step`.
    if unplaced := [name for name in names if name.partition("/")[0] not in {*SECTIONS, "step"}]:
        raise LookupError(f"no section of docs/metrics.md takes {unplaced}: add one to SECTIONS of tools/maintain/make_metrics_doc.py")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

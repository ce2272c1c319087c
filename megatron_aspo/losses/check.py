"""Which options of the algorithm go together; light, so that a recipe is checked without importing torch."""

from collections.abc import Mapping
from typing import Any

from megatron_aspo.common.errors import UserError, nearest, require
from megatron_aspo.common.options import default_of, option_fields
from megatron_aspo.losses import names
from megatron_aspo.losses.options import AlgorithmOptions

_CLASSES = ("low_entropy_quantile", "entropy_quantile_scope", "high_entropy_clip_low", "high_entropy_clip_high")
_CLIP = ("clip_low", "clip_high")
_READ_BY_LOSS = {
    "aspo": {*_CLIP, *_CLASSES, "dual_clip_neg", "dual_clip_pos"},
    "ppo_clip": {*_CLIP, "dual_clip_neg"},
    "archer": {*_CLIP, *_CLASSES, "dual_clip_neg", "high_entropy_kl_coef"},
    "gspo": {*_CLIP},
    "cispo": {*_CLIP},
    "reinforce": set(),
    "no_is": {*_CLIP},
}
"""Which options of a policy loss each one looks at."""


def reads_entropy_classes(options: AlgorithmOptions) -> bool:
    """Whether the policy loss may tell low-entropy tokens from others: two of ours do, and one of the user's own may."""
    return options.policy_loss in names.ENTROPY_CLASS_LOSSES or ":" in options.policy_loss


def check_algorithm(
    options: AlgorithmOptions, responses_per_prompt: int, max_response_tokens: int, implied: Mapping[str, Any] | None = None
) -> None:
    """Raises UserError for values and combinations that cannot work or would have no effect, with the rule and the cure.

    implied: values that a preset or the policy loss set, which may stand without effect.
    """
    loss = options.policy_loss
    own = ":" in loss
    require(
        own or loss in names.POLICY_LOSS_NAMES,
        f"algorithm.policy_loss={loss} is not known; {nearest(loss, names.POLICY_LOSS_NAMES)}; one of your own is package.module:function",
    )
    _check_effect(options, own, implied or {})
    _check_combinations(options, responses_per_prompt, max_response_tokens)


def _check_effect(options: AlgorithmOptions, own: bool, implied: Mapping[str, Any]) -> None:
    """An option that nothing would read is a mistake of whoever set it."""

    def needs(reason: str, *unread: str) -> None:
        for name in (name for name in option_fields(options) if name in unread):
            value = getattr(options, name)
            if value not in (default_of(AlgorithmOptions, name), implied.get(name)):
                raise UserError(f"algorithm.{name}={value} has no effect: it needs {reason}; remove it")

    if own:
        needs("policy_loss=archer", "high_entropy_kl_coef")
    else:
        needs("a policy loss of your own", "policy_loss_options")
        read = _READ_BY_LOSS[options.policy_loss]
        for name in sorted(set().union(*_READ_BY_LOSS.values()) - read):
            readers = [loss for loss, its in _READ_BY_LOSS.items() if name in its]
            needs(f"policy_loss {' or '.join(readers)}, not {options.policy_loss}", name)
    if options.policy_loss == "reinforce":
        needs("a policy loss with a ratio, not reinforce", "old_logprobs")
    if options.aggregation == "token_mean":
        needs("a seq_mean aggregation", "sequence_count")
    if options.advantage != "grpo":
        needs("advantage=grpo", "advantage_std")
    if options.advantage != "reinforce_plus_plus":
        needs("advantage=reinforce_plus_plus", "subtract_group_mean")
    if not options.has_kl:
        needs("kl_coef above 0", "kl_estimator", "kl_in", "kl_value_clamp")
    if options.rollout_correction == "none":
        needs("rollout_correction=tis or mask", "rollout_correction_cap")
    if options.group_filter != "resample":
        needs("group_filter=resample", "resample_rounds")
    if not options.overlong_buffer_tokens:
        needs("overlong_buffer_tokens above 0", "overlong_factor")


def _check_combinations(options: AlgorithmOptions, responses_per_prompt: int, max_response_tokens: int) -> None:
    require(
        not (options.has_kl and options.kl_in == "loss" and options.kl_estimator == "k1"),
        "algorithm.kl_estimator=k1 in the loss has no useful gradient: its mean over samples is zero; take k2 or k3, or kl_in=reward",
    )
    require(
        not (options.policy_loss == "archer" and options.kl_in == "reward"),
        "algorithm.policy_loss=archer weights the KL term by token, which a reward cannot; set kl_in=loss",
    )
    require(
        options.old_logprobs == "recompute" or options.rollout_correction == "none",
        f"algorithm.rollout_correction={options.rollout_correction} corrects π_old against the engine, but old_logprobs=rollout takes the "
        "engine's own: there is nothing to correct; set one of them back",
    )
    require(
        options.overlong_buffer_tokens <= max_response_tokens,
        f"algorithm.overlong_buffer_tokens={options.overlong_buffer_tokens} is more than rollout.max_response_tokens={max_response_tokens}",
    )
    if responses_per_prompt == 1:
        alone = "rollout.responses_per_prompt=1 leaves nothing to compare within a group, but"
        require(
            options.advantage == "reinforce_plus_plus" and not options.subtract_group_mean,
            f"{alone} algorithm.advantage={options.advantage} subtract_group_mean={options.subtract_group_mean} does so; "
            "take at least 2, or advantage=reinforce_plus_plus without the group mean",
        )
    whitened = options.advantage == "reinforce_plus_plus" and not options.subtract_group_mean
    for reason, carries in (
        ("advantage=reinforce_plus_plus without subtract_group_mean", whitened),
        ("kl_in=reward", options.kl_in == "reward"),
    ):
        require(
            not carries or options.group_filter == "none",
            f"algorithm.group_filter={options.group_filter} leaves out groups by their rewards alone, but with {reason} such groups carry "
            "gradient; set group_filter=none",
        )

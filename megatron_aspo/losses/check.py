"""Which options of the algorithm go together; light, so that a recipe is checked without importing torch."""

from collections.abc import Mapping
from typing import Any

from megatron_aspo.common.errors import UserError, nearest, require
from megatron_aspo.common.options import default_of, option_fields
from megatron_aspo.losses import registry
from megatron_aspo.losses.declaration import Declaration
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.section import check_loss_options


def check_algorithm(
    options: AlgorithmOptions, responses_per_prompt: int, max_response_tokens: int, implied: Mapping[str, Any] | None = None
) -> None:
    """Raise UserError for combinations that cannot work or would have no effect, with the rule and the cure.

    implied: values that a preset or the policy loss set; they may be without effect.
    """
    loss = options.policy_loss
    require(
        registry.is_custom(loss) or loss in registry.POLICY_LOSSES,
        f"algorithm.policy_loss={loss} is not known; {nearest(loss, registry.POLICY_LOSSES)}; one of your own is package.module:function",
    )
    check_loss_options(options)
    _check_effect(options, registry.declaration(loss), implied or {})
    _check_combinations(options, responses_per_prompt, max_response_tokens)


def _check_effect(options: AlgorithmOptions, declared: Declaration, implied: Mapping[str, Any]) -> None:
    """Refuse an option that nothing would read: whoever set it was mistaken."""

    def needs(reason: str, *unread: str) -> None:
        for name in (name for name in option_fields(options) if name in unread):
            value = getattr(options, name)
            if value not in (default_of(AlgorithmOptions, name), implied.get(name)):
                raise UserError(f"algorithm.{name}={value} has no effect: it needs {reason}; remove it")

    def losses_that_declare(what: str) -> str:
        names = " or ".join(registry.losses_that_declare(what))
        return f"policy_loss={names}" if registry.is_custom(options.policy_loss) else f"policy_loss {names}, not {options.policy_loss}"

    if not declared.entropy_classes:
        needs(losses_that_declare("entropy_classes"), "entropy_quantile_scope", "low_entropy_quantile")
    if not declared.kl_by_entropy_class:
        needs(losses_that_declare("kl_by_entropy_class"), "high_entropy_kl_coef")
    if not declared.ratio:
        needs(f"a policy loss with a ratio, not {options.policy_loss}", "old_logprobs")
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
        not (registry.declaration(options.policy_loss).kl_by_entropy_class and options.kl_in == "reward"),
        f"algorithm.policy_loss={options.policy_loss} weights the KL term by token, which a reward cannot; set kl_in=loss",
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

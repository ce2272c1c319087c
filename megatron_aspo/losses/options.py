"""Options of the algorithm around the policy loss. Formulas and pictures: docs/losses.md. Which go together: `check.py` beside this file.

The options of a policy loss are in its own signature (builtin/).
"""

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from megatron_aspo.common.options import Choice, NonNegative, Positive, Rule, options, suggested
from megatron_aspo.losses.declaration import Cap
from megatron_aspo.losses.registry import POLICY_LOSSES


@options("algorithm")
class AlgorithmOptions:
    policy_loss: Annotated[str, suggested(*POLICY_LOSSES)] = "aspo"
    """`aspo | ppo_clip | archer | gspo | cispo | reinforce | no_is`, or `package.module:function` for a custom loss."""
    policy_loss_options: dict[str, Any] = field(default_factory=dict)
    """Options of the policy loss, by name. An option of a built-in loss may also be written beside the other keys, as in
    `algorithm.clip_low`."""
    low_entropy_quantile: Annotated[float, Field(ge=0, le=1), Rule("must be in [0, 1]")] = 0.8
    """`aspo`, `archer`: tokens whose entropy is at or below this quantile are low-entropy."""
    entropy_quantile_scope: Annotated[str, Choice("response", "mini_batch")] = "response"
    """The quantile is taken over the counted tokens of the `response` or of the `mini_batch`; the latter costs one more forward pass
    per update."""
    aggregation: Annotated[str, Choice("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")] = "token_mean"
    """The one mean over the mini-batch: `token_mean | seq_mean_token_mean | seq_mean_token_sum | seq_mean_token_sum_norm`. Default of
    `gspo`: `seq_mean_token_mean`."""
    sequence_count: Annotated[str, Choice("counted", "full_mini_batch")] = "counted"
    """Divisor of the `seq_mean` aggregations: `counted`, the responses with a counted token; `full_mini_batch`, `mini_batch_prompts` ×
    `rollout.responses_per_prompt`, whatever was filtered."""
    advantage: Annotated[str, Choice("grpo", "rloo", "reinforce_plus_plus")] = "grpo"
    """`grpo`: (R − mean) / (std + 1e-6) over the group; `rloo`: R − mean of the group's others; `reinforce_plus_plus`: R, whitened over
    all counted tokens of the step."""
    advantage_std: bool = True
    """`grpo`: divide by the standard deviation; `false` is Dr.GRPO."""
    subtract_group_mean: bool = False
    """`reinforce_plus_plus`: subtract the group's mean from R before whitening."""
    kl_coef: NonNegative[float] = 0.001
    """β, the weight of the KL estimate against the frozen reference policy; 0 builds no reference. `archer`: for low-entropy tokens."""
    high_entropy_kl_coef: NonNegative[float] = 0.0
    """`archer`: β of high-entropy tokens."""
    kl_estimator: Annotated[str, Choice("k1", "k2", "k3")] = "k3"
    """Per-token KL estimate; in the loss `k2` or `k3`."""
    kl_in: Annotated[str, Choice("loss", "reward")] = "loss"
    """`loss` adds β · KL to each token's loss; `reward` subtracts β times the response's summed KL, under the policy at the start of
    the phase, from its reward."""
    kl_value_clamp: NonNegative[float] = 0.0
    """Upper bound of the estimate's absolute value; beyond it the gradient is 0 too. 0 means no bound."""
    entropy_coef: NonNegative[float] = 0.0
    """Weight of the entropy bonus."""
    old_logprobs: Annotated[str, Choice("recompute", "rollout")] = "recompute"
    """Source of log π_old: `recompute`, the trainer's policy at the start of the phase; `rollout`, what the engine reported while
    sampling."""
    rollout_correction: Annotated[str, Choice("none", "tis", "mask")] = "none"
    """Correction of the engine–trainer mismatch u = π_old / μ: `tis` multiplies the policy term by min(u, C); `mask` drops it outside
    [1/C, C]."""
    rollout_correction_cap: Cap = 2.0
    """C of the rollout correction."""
    epochs: Positive[int] = 3
    """Training passes over a step's samples."""
    mini_batch_prompts: Positive[int] = 16
    """Prompts (groups) per optimizer step."""
    batch_order: Annotated[str, Choice("shuffled", "data_index")] = "shuffled"
    """`shuffled`: a new order for each epoch. `data_index`: by position in the data set, truncated to a multiple of the training ranks."""
    group_filter: Annotated[str, Choice("none", "drop", "resample", "drop_zero_or_one")] = "drop"
    """Where advantages compare within the group, groups whose shaped rewards are all equal carry no gradient: `none` keeps them, `drop`
    leaves them out, `resample` draws other prompts for them; `drop_zero_or_one` leaves out only those that are all 0 or all 1."""
    resample_rounds: Positive[int] = 3
    """`resample`: upper bound on extra generations in a step."""
    overlong_buffer_tokens: NonNegative[int] = 0
    """Length penalty: over this many tokens before `rollout.max_response_tokens` it grows from 0 to `overlong_factor`; 0 means no
    penalty."""
    overlong_factor: Positive[float] = 1.0
    """Largest length penalty, subtracted from the reward."""
    overlong_filter: bool = False
    """Truncated responses count in no loss; their rewards still count in the group's statistics."""

    @property
    def has_kl(self) -> bool:
        """Whether a reference policy is needed."""
        return self.kl_coef > 0 or self.high_entropy_kl_coef > 0

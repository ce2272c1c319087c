"""Options of the algorithm: what is optimized. Formulas and pictures: docs/losses.md. Which go together: `check.py` beside this file."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AlgorithmOptions:
    policy_loss: str = "aspo"
    """`aspo | ppo_clip | archer | gspo | cispo | reinforce | no_is`, or `package.module:function` for one of your own."""
    policy_loss_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a policy loss of your own, by name."""
    clip_low: float = 0.2
    """ε below 1 of the ratio; with entropy classes, of low-entropy tokens. `gspo` sets 3e-4, `cispo` 1.0 (no lower bound)."""
    clip_high: float = 0.2
    """ε above 1 of the ratio; with entropy classes, of low-entropy tokens. `gspo` sets 4e-4."""
    high_entropy_clip_low: float = 0.4
    """`aspo`, `archer`: ε below 1 for the other tokens."""
    high_entropy_clip_high: float = 0.4
    """`aspo`, `archer`: ε above 1 for the other tokens."""
    low_entropy_quantile: float = 0.8
    """`aspo`, `archer`: tokens with entropy at or under this quantile are low-entropy."""
    entropy_quantile_scope: str = "response"
    """`response | mini_batch`: whose counted tokens the quantile is of. `mini_batch` costs one more forward pass."""
    dual_clip_neg: float = 3.0
    """`aspo`, `ppo_clip`, `archer`: c_neg, cap of the weight where A < 0."""
    dual_clip_pos: float = 3.0
    """`aspo`: c_pos, cap of the inverted weight where A > 0."""
    aggregation: str = "token_mean"
    """`token_mean | seq_mean_token_mean | seq_mean_token_sum | seq_mean_token_sum_norm`, over the mini-batch. `gspo` sets the second."""
    sequence_count: str = "counted"
    """What the `seq_mean` aggregations divide by: `counted`, the responses with a counted token; `full_mini_batch`, mini_batch_prompts ×
    responses_per_prompt whatever was filtered."""
    advantage: str = "grpo"
    """`grpo`: (R − mean) / (std + 1e-6) over the group; `rloo`: R − mean of the group's others; `reinforce_plus_plus`: R, whitened over
    all counted tokens of the step."""
    advantage_std: bool = True
    """`grpo`: divide by the standard deviation; false is Dr.GRPO's."""
    subtract_group_mean: bool = False
    """`reinforce_plus_plus`: take the group's mean from R before whitening."""
    kl_coef: float = 0.001
    """β of the KL estimate against the frozen reference; 0 builds no reference. `archer`: of low-entropy tokens."""
    high_entropy_kl_coef: float = 0.0
    """`archer`: β of the other tokens."""
    kl_estimator: str = "k3"
    """`k1 | k2 | k3`, per token; in the loss k2 or k3."""
    kl_in: str = "loss"
    """`loss`, or `reward`: β × the sum over the response, under the policy at the start of the phase, is taken from its reward."""
    kl_value_clamp: float = 0.0
    """Bound of the estimate's absolute value, which also stops its gradient beyond; 0 is none."""
    entropy_coef: float = 0.0
    """Bonus on mean entropy."""
    old_logprobs: str = "recompute"
    """π_old: `recompute`, the trainer's policy at the start of the phase; `rollout`, the engine's, of the version that sampled each."""
    rollout_correction: str = "none"
    """For engine–trainer mismatch u = π_old / μ: `tis` multiplies the policy term by min(u, C); `mask` drops it outside [1/C, C]."""
    rollout_correction_cap: float = 2.0
    """C of the rollout correction."""
    epochs: int = 3
    """Passes over the step's samples."""
    mini_batch_prompts: int = 16
    """Groups of one optimizer step."""
    batch_order: str = "shuffled"
    """`shuffled`: an order of its own for each epoch; `data_index`: by place in the data set, cut to a multiple of the training ranks."""
    group_filter: str = "drop"
    """Where advantages compare within the group, groups whose shaped rewards are all equal carry no gradient: `none` keeps them, `drop`
    leaves them out, `resample` draws other prompts for them; `drop_zero_or_one` leaves out only those that are all 0 or all 1."""
    resample_rounds: int = 3
    """`resample`: most extra generations in a step."""
    overlong_buffer_tokens: int = 0
    """The last tokens before rollout.max_response_tokens over which the length penalty grows from 0 to overlong_factor; 0 is no penalty."""
    overlong_factor: float = 1.0
    """Largest length penalty, taken from the reward."""
    overlong_filter: bool = False
    """Responses that were cut off count in no loss; their rewards still count in the group's statistics."""

    @property
    def has_kl(self) -> bool:
        """Whether a reference policy is needed."""
        return self.kl_coef > 0 or self.high_entropy_kl_coef > 0

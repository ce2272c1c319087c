"""Options of the algorithm: what is optimized. Formulas: docs of `losses/`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AlgorithmOptions:
    policy_loss: str = "aspo"
    """`aspo | ppo_clip`."""
    advantage: str = "grpo"
    """`grpo`: (R − mean) / (std + 1e-6) over the group."""
    clip_low: float = 0.2
    """ε below 1 of the ratio; for `aspo` of low-entropy tokens."""
    clip_high: float = 0.2
    """ε above 1 of the ratio; for `aspo` of low-entropy tokens."""
    high_entropy_clip_low: float = 0.4
    """`aspo`: ε below 1 for the other tokens."""
    high_entropy_clip_high: float = 0.4
    """`aspo`: ε above 1 for the other tokens."""
    low_entropy_quantile: float = 0.8
    """`aspo`: tokens with entropy at or under this quantile of their own response are low-entropy."""
    dual_clip_neg: float = 3.0
    """c_neg: cap of the weight where A < 0."""
    dual_clip_pos: float = 3.0
    """`aspo`: c_pos, cap of the inverted weight where A > 0."""
    kl_coef: float = 0.001
    """β of the k3 estimate against the frozen reference; 0 builds no reference."""
    entropy_coef: float = 0.0
    """Bonus on mean entropy."""
    epochs: int = 3
    """Passes over the step's samples."""
    mini_batch_prompts: int = 16
    """Groups of one optimizer step."""
    group_filter: str = "drop"
    """`none | drop`: groups whose rewards are all equal carry no gradient; drop leaves them out."""

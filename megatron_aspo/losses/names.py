"""The names a configuration may use for losses, known without importing torch; a test holds them equal to the tables' keys."""

POLICY_LOSS_NAMES = ("aspo", "ppo_clip", "archer", "gspo", "cispo", "reinforce", "no_is")
ENTROPY_CLASS_LOSSES = ("aspo", "archer")
"""Those that treat low-entropy and other tokens differently."""
ADVANTAGE_NAMES = ("grpo", "rloo", "reinforce_plus_plus")
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
SEQUENCE_COUNTS = ("counted", "full_mini_batch")
ENTROPY_SCOPES = ("response", "mini_batch")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")
OLD_LOGPROBS = ("recompute", "rollout")
ROLLOUT_CORRECTIONS = ("none", "tis", "mask")
BATCH_ORDERS = ("shuffled", "data_index")
GROUP_FILTERS = ("none", "drop", "resample", "drop_zero_or_one")

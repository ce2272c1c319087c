"""The names a configuration may use for losses, known without importing torch; a test holds them equal to the tables' keys."""

POLICY_LOSS_NAMES = ("aspo", "ppo_clip")
ADVANTAGE_NAMES = ("grpo",)
GROUP_FILTERS = ("none", "drop")

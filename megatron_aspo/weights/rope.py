"""Scaled rotary embeddings, of models whose context was extended beyond the length of their pretraining.

The frequencies are those that transformers computes from the config. Megatron-Core's options cannot express them all: its `rope_scaling`
is Llama 3.1's with a fixed original length and band, and linear interpolation scales positions, which rounds differently.
"""

from dataclasses import dataclass
from typing import Any

from megatron_aspo.common.errors import UserError

_YARN_OPTIONS = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"}
_SETTINGS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", *_YARN_OPTIONS},
}
"""rope_type → the parameters that both transformers and vLLM read."""
_COMMON_SETTINGS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies that do not follow from rope_theta alone."""

    frequencies: tuple[float, ...]
    """Radians per position of each pair of channels [head size / 2]; values of float32."""
    attention_factor: float
    """Factor of cosines and sines; attention scores are multiplied by its square."""
    longest: int | None
    """Positions for which engines compute cosines and sines; None: the config's max_position_embeddings."""


def read_rope_scaling(config: Any, where: str) -> RopeScaling | None:
    """Return the rotary frequencies that a transformers config requires, None if they follow from rope_theta alone.

    where: names the file in errors. Raises UserError for a type or setting that transformers and vLLM interpret differently.
    """
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in _SETTINGS:
        raise UserError(f"{where}: rope_type={kind} is not supported; expected one of {', '.join(['default', *_SETTINGS])}")
    for key in rope.keys() - _SETTINGS[kind] - _COMMON_SETTINGS:
        raise UserError(f"{where}: {key}={rope[key]} is not a setting of rope_type={kind}; remove it")
    for key in sorted(_SETTINGS[kind] - _YARN_OPTIONS | rope.keys() & _YARN_OPTIONS - {"truncate"}):
        least = 1 if key == "factor" else 0
        if isinstance(rope.get(key), bool) or not isinstance(rope.get(key), int | float) or not least <= rope[key] < float("inf"):
            raise UserError(f"{where}: {key}={rope.get(key)} is not supported with rope_type={kind}; expected a number from {least} on")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise UserError(f"{where}: low_freq_factor={rope['low_freq_factor']} must be below high_freq_factor={rope['high_freq_factor']}")

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    longest = int(rope["original_max_position_embeddings"] * rope["factor"]) if kind == "yarn" else None
    return RopeScaling(tuple(frequencies.tolist()), float(attention_factor), longest)

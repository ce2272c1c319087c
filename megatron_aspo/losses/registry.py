"""The table of built-in policy losses, and what a recipe needs to know of one. A new loss is one file in builtin/ and one row here."""

from functools import cache
from typing import Any, cast

from megatron_aspo.losses.declaration import CUSTOM, OPTION_TYPES, Declaration
from megatron_aspo.losses.signature import LossOption, LossSignature, read_signature

POLICY_LOSSES = {
    "aspo": "megatron_aspo.losses.builtin.aspo:aspo",
    "ppo_clip": "megatron_aspo.losses.builtin.ppo_clip:ppo_clip",
    "archer": "megatron_aspo.losses.builtin.archer:archer",
    "gspo": "megatron_aspo.losses.builtin.gspo:gspo",
    "cispo": "megatron_aspo.losses.builtin.cispo:cispo",
    "reinforce": "megatron_aspo.losses.builtin.reinforce:reinforce",
    "no_is": "megatron_aspo.losses.builtin.no_is:no_is",
}
"""Name in a recipe → `package.module:function`."""


def is_custom(policy_loss: str) -> bool:
    """Whether a recipe names a function by its path instead of a built-in loss."""
    return ":" in policy_loss


def signature(policy_loss: str) -> LossSignature | None:
    """Return the signature of a built-in or custom loss; None for an unknown name, or a custom loss whose source does not tell."""
    path = POLICY_LOSSES.get(policy_loss, policy_loss)
    return read_signature(path) if is_custom(path) else None


def declaration(policy_loss: str) -> Declaration:
    """Return what the loss declares; the default of custom or of built-in losses where it declares nothing."""
    found = signature(policy_loss)
    if found and found.declaration:
        return found.declaration
    return CUSTOM if is_custom(policy_loss) else Declaration()


def losses_that_declare(field: str) -> list[str]:
    """Return the names of the built-in losses whose `Declaration` has a true value in this field."""
    return [loss for loss in POLICY_LOSSES if getattr(declaration(loss), field)]


@cache
def builtin_options() -> dict[str, dict[str, LossOption]]:
    """Return, for each option of any built-in loss, the losses that read it, in the order of the table: option → loss → its option."""
    readers: dict[str, dict[str, LossOption]] = {}
    for loss in POLICY_LOSSES:
        for name, option in cast(LossSignature, signature(loss)).options.items():
            readers.setdefault(name, {})[loss] = option
    return readers


def option_type(option: LossOption) -> Any:
    """Return the type of an option: its annotation where that carries bounds, else the type of its default."""
    return OPTION_TYPES.get(option.annotation, type(option.default))


def option_meaning(name: str) -> str:
    """Return what an option means under each built-in loss that reads it, as one sentence."""
    losses_of: dict[str, list[str]] = {}
    for loss, option in builtin_options()[name].items():
        losses_of.setdefault(option.meaning.rstrip("."), []).append(f"`{loss}`")
    return "; ".join(f"{', '.join(losses)}: {text[0].lower()}{text[1:]}" for text, losses in losses_of.items()) + "."


@cache
def shared_defaults() -> dict[str, Any]:
    """Return the default of each built-in option under the first loss of the table that reads it."""
    return {name: next(iter(readers.values())).default for name, readers in builtin_options().items()}


def own_defaults(policy_loss: str) -> dict[str, Any]:
    """Return the keys of `algorithm` for which this loss has another default than the other losses, with its own."""
    found = signature(policy_loss)
    if not found:
        return {}
    shared, aggregation = shared_defaults(), declaration(policy_loss).aggregation
    own = {name: option.default for name, option in found.options.items() if name in shared and option.default != shared[name]}
    return own | ({"aggregation": aggregation} if aggregation != Declaration.aggregation else {})

"""The `algorithm` section of a recipe: which of its keys are options of the policy loss.

A recipe writes an option of its loss like any other key, `algorithm.clip_low`, or inside `algorithm.policy_loss_options`. Here the two
become one. Light, so that a recipe is checked without importing torch.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_aspo.common.errors import UserError, nearest
from megatron_aspo.common.options import build, option_fields, options
from megatron_aspo.common.strict_yaml import number_if_one
from megatron_aspo.losses import registry
from megatron_aspo.losses.declaration import OPTION_TYPES
from megatron_aspo.losses.options import AlgorithmOptions

FIELDS = frozenset(option_fields(AlgorithmOptions))
INSIDE = "policy_loss_options"
SECTION = "algorithm"


def lift_loss_options(section: dict[str, Any], *, replace: bool = False) -> dict[str, Any]:
    """Return the section with the options of built-in losses moved out of `policy_loss_options`, beside its other keys.

    replace: a value inside takes the place of one beside it. Otherwise raises UserError where an option is written in both places.
    """
    inside = section.get(INSIDE)
    if not isinstance(inside, dict):
        return section
    moved = {name: value for name, value in inside.items() if name in registry.builtin_options()}
    for name in moved.keys() & section.keys() if not replace else ():
        raise UserError(f"algorithm.{name} and algorithm.{INSIDE}.{name} are one option and both are set; remove one of them")
    rest = {name: value for name, value in inside.items() if name not in moved}
    return {key: value for key, value in section.items() if key != INSIDE} | moved | ({INSIDE: rest} if rest or not moved else {})


def gather_loss_options(section: dict[str, Any], implied: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section as the keys of `AlgorithmOptions`: options of the loss are in `policy_loss_options`.

    A built-in loss gets all its options there, those that the section lacks at their defaults. An option of other losses is dropped at its
    default or implied value, and refused otherwise. implied: values that the preset or the loss set, not the recipe.
    Raises UserError for an unknown key, an option that the loss does not read, a value of another type.
    """
    loss = str(section.get("policy_loss", AlgorithmOptions.policy_loss))
    signature, builtin = registry.signature(loss), registry.builtin_options()
    inside = section.get(INSIDE, {})
    if not isinstance(inside, dict) or not all(isinstance(name, str) for name in inside):
        return {key: value for key, value in section.items() if key in FIELDS}  # refused with its type
    chosen, shared = {}, registry.shared_defaults()
    for name in [key for key in section if key not in FIELDS]:
        value = number_if_one(section[name])
        if signature and name in signature.options:
            chosen[name] = value
        elif name not in builtin:
            known = [*FIELDS, *builtin, *(signature.options if signature else ())]
            raise UserError(f"unknown key algorithm.{name}; {nearest(str(name), known, 'algorithm.')}")
        elif value in (shared[name], implied.get(name, shared[name])):
            continue
        elif signature:
            raise UserError(_no_effect(name, value, loss))
        else:  # the function itself decides when it is bound; an unknown name is refused by check_algorithm
            chosen[name] = value
    if signature and loss in registry.POLICY_LOSSES:
        if unknown := inside.keys() - signature.options.keys():
            raise UserError(_no_effect(INSIDE, {name: inside[name] for name in inside if name in unknown}, loss))
        given = chosen | inside
        chosen = asdict(build(option_class(loss), {name: given[name] for name in signature.options if name in given}))
        inside = {}
    rest = {key: value for key, value in section.items() if key in FIELDS and key != INSIDE}
    return rest | {INSIDE: chosen | inside}


def algorithm_options(**section: Any) -> AlgorithmOptions:
    """Return the options of an `algorithm` section, with the loss's own defaults under what it sets. Raises UserError as above."""
    own = registry.own_defaults(section.get("policy_loss", AlgorithmOptions.policy_loss))
    return AlgorithmOptions(**gather_loss_options(own | lift_loss_options(section), own))


def check_loss_options(options: AlgorithmOptions) -> None:
    """Raise UserError for an option that the policy loss does not read, and for a value of another type or out of its bounds."""
    loss, given = options.policy_loss, options.policy_loss_options
    signature = registry.signature(loss)
    if signature is None:
        return
    if loss in registry.POLICY_LOSSES:
        for name in given.keys() - signature.options.keys():
            known = name in registry.builtin_options()
            raise UserError(_no_effect(name if known else INSIDE, given[name] if known else {name: given[name]}, loss))
    kind = option_class(loss)
    kind(**{name: value for name, value in given.items() if name in option_fields(kind)})


def option_class(policy_loss: str) -> type:
    """Return the class of a loss's options, which checks types and bounds. Of a custom loss it has those with an annotation of ours."""
    signature = registry.signature(policy_loss)
    fields = {
        name: (registry.option_type(option), option.default)
        for name, option in (signature.options if signature else {}).items()
        if policy_loss in registry.POLICY_LOSSES or option.annotation in OPTION_TYPES
    }
    defaults = {name: default for name, (_, default) in fields.items()}
    return options(SECTION)(type("LossOptions", (), {"__annotations__": {n: kind for n, (kind, _) in fields.items()}} | defaults))


def _no_effect(name: str, value: Any, loss: str) -> str:
    readers = registry.builtin_options().get(name, {})
    needs = "a policy loss of your own" if name == INSIDE else f"policy_loss {' or '.join(readers)}, not {loss}"
    return f"algorithm.{name}={value} has no effect: it needs {needs}; remove it"

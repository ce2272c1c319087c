"""Mini-batches for the tests of the losses, and the comparison with the reference."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import settings, strategies as st

from megatron_aspo.losses import registry
from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.find import find_policy_loss
from megatron_aspo.losses.objective import Objective, ObjectiveTokens
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.policy import PolicyLoss, PolicyTokens
from megatron_aspo.losses.section import FIELDS
from megatron_aspo.losses.tally import Tally
from tests.reference import losses as reference
from tests.reference.losses import Response, Result

LOSSES = list(reference.POLICY)
AGGREGATIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
CORRECTIONS = ["none", "tis", "mask"]
SCOPES = ["response", "mini_batch"]
FULL_RESPONSES, MAX_RESPONSE_TOKENS = 16, 64


COMMON = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "high_entropy_clip_low": 0.4,
    "high_entropy_clip_high": 0.4,
    "dual_clip_neg": 3.0,
    "dual_clip_pos": 3.0,
}
"""Options of the policy losses, with values that tests give to each loss that reads them, also where its own default differs."""


def algorithm(**given: Any) -> AlgorithmOptions:
    """Options under the names of a recipe, over COMMON. The policy loss gets the options that it reads."""
    loss = given.get("policy_loss", AlgorithmOptions.policy_loss)
    chosen = {name: (COMMON | given).get(name, option.default) for name, option in registry.signature(loss).options.items()}
    return AlgorithmOptions(policy_loss_options=chosen, **{name: value for name, value in given.items() if name in FIELDS})


def by_name(options: AlgorithmOptions) -> SimpleNamespace:
    """The same options in one namespace, as the reference reads them."""
    return SimpleNamespace(**COMMON | asdict(options) | options.policy_loss_options)


def policy_loss(name: str, **given: Any) -> PolicyLoss:
    """The built-in loss with its options bound."""
    return find_policy_loss(algorithm(policy_loss=name, **given))


def objective(tokens: ObjectiveTokens, options: AlgorithmOptions, totals: Totals) -> tuple[torch.Tensor, Tally]:
    return Objective(options)(tokens, totals)


def few(examples: int) -> settings:
    """The same examples in every run."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


def random_response(random: np.random.Generator, mask: np.ndarray, extremes: bool = True) -> Response:
    """Ratios within, at and beyond all bounds; ties in entropy; log-ratios beyond 20; what does not count is not even finite."""
    n = len(mask)

    def around(center: np.ndarray, spread: float) -> np.ndarray:
        far = random.choice([-21.0, -20.5, 20.5, 25.0], n) if extremes else 0.0
        return center + np.where(random.random(n) < 0.06, far, random.normal(0, spread, n))

    old = random.normal(-2, 1, n)
    logp = around(old, 0.8)
    entropy = np.where(random.random(n) < 0.3, random.choice([0.5, 1.0, 1.5], n), random.random(n) * 2)
    garbage = random.choice([np.nan, np.inf, -np.inf], (5, n))
    arrays = [logp, old, around(old, 0.7), around(logp, 1.2), entropy]
    A = float(random.choice([0.0, 1.0, -1.0, *random.normal(0, 1, 5)]))
    return Response(*(np.where(mask, array, other) for array, other in zip(arrays, garbage)), mask=mask, A=A)


@st.composite
def mini_batches(draw, extremes: bool = True, most: int = 7) -> list[Response]:
    """Responses that are empty, of one token, wholly uncounted or in part."""
    kinds = draw(st.lists(st.tuples(st.sampled_from([0, 1, 2, 5, 11]), st.sampled_from(["all", "none", "some"])), max_size=most))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    masks = {"all": lambda n: np.ones(n, bool), "none": lambda n: np.zeros(n, bool), "some": lambda n: random.random(n) < 0.6}
    return [random_response(random, masks[kind](n), extremes) for n, kind in kinds]


def one_of_each(seed: int = 0) -> list[Response]:
    """Responses of 0, 1, 1, 9 and 30 tokens, some or none of them counted, both signs and zero among the advantages."""
    random = np.random.default_rng(seed)
    masks = [random.random(n) < 0.8 for n in (9, 30, 30, 17)]
    masks += [np.zeros(0, bool), np.ones(1, bool), np.zeros(1, bool), np.zeros(6, bool), np.ones(12, bool)]
    A = [1.2, -0.7, 0.9, -1.1, 1.0, -0.4, 2.0, 1.0, 0.0]
    return [Response(**random_response(random, mask).__dict__ | {"A": a}) for mask, a in zip(masks, A)]


def options_of(**given) -> st.SearchStrategy[AlgorithmOptions]:
    """Options that differ from one another wherever one could stand for another."""
    choices = {
        "clip_low": [0.2, 0.1, 1.0],
        "clip_high": [0.2, 0.3],
        "high_entropy_clip_low": [0.4, 0.5],
        "high_entropy_clip_high": [0.4, 0.6],
        "low_entropy_quantile": [0.8, 0.5, 0.0, 1.0],
        "dual_clip_neg": [3.0, 1.5],
        "dual_clip_pos": [3.0, 1.25],
        "sequence_count": ["counted", "full_mini_batch"],
        "kl_coef": [0.001, 0.0, 0.3],
        "high_entropy_kl_coef": [0.0, 0.2],
        "kl_estimator": ["k3", "k2"],
        "kl_in": ["loss", "reward"],
        "kl_value_clamp": [0.0, 0.5, 10.0],
        "entropy_coef": [0.0, 0.01],
        "rollout_correction_cap": [2.0, 1.3],
    }
    return st.builds(algorithm, **{name: st.sampled_from(of) for name, of in choices.items()} | {n: st.just(v) for n, v in given.items()})


def float32(responses: Sequence[Response]) -> list[Response]:
    """The same values rounded to float32, held in float64."""
    return [r.map(lambda array: array.astype(np.float32).astype(np.float64)) for r in responses]


def as_tokens(responses: Sequence[Response], dtype: torch.dtype = torch.float64) -> ObjectiveTokens:
    """Log-probabilities and entropy are leaves that take a gradient."""

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0), *[getattr(r, name) for r in responses]])).to(dtype)

    lengths = [len(r.mask) for r in responses]
    return ObjectiveTokens(
        logprobs=joined("logp").requires_grad_(),
        entropy=joined("entropy").requires_grad_(),
        old_logprobs=joined("old"),
        rollout_logprobs=joined("rollout"),
        ref_logprobs=None if any(r.ref is None for r in responses) else joined("ref"),
        advantages=torch.from_numpy(np.repeat([r.A for r in responses], lengths)).to(dtype),
        mask=torch.from_numpy(np.concatenate([np.zeros(0, bool), *[r.mask for r in responses]])),
        offsets=np.cumsum([0, *lengths]).tolist(),
        names=tuple(f"p{i}[0]" for i in range(len(responses))),
    )


def policy_tokens(responses: Sequence[Response], low: Sequence[bool], dtype=torch.float64) -> PolicyTokens:
    """What a policy loss gets; `low` marks low-entropy tokens. Uncounted tokens hold zeros."""
    tokens = as_tokens([r.map(lambda array, mask=r.mask: np.where(mask, array, 0.0)) for r in responses], dtype)
    return PolicyTokens(
        logprobs=tokens.logprobs,
        old_logprobs=tokens.old_logprobs,
        advantages=tokens.advantages,
        entropy=tokens.entropy.detach(),
        low_entropy=torch.tensor(low, dtype=torch.bool),
        mask=tokens.mask,
        offsets=tokens.offsets,
    )


def totals(responses: Sequence[Response], options: AlgorithmOptions) -> Totals:
    return Totals(
        tokens=sum(int(r.mask.sum()) for r in responses),
        responses=sum(bool(r.mask.any()) for r in responses),
        full_responses=FULL_RESPONSES,
        max_response_tokens=MAX_RESPONSE_TOKENS,
        entropy_threshold=reference.entropy_threshold(responses, by_name(options)),
    )


def truth(responses: Sequence[Response], options: AlgorithmOptions) -> Result:
    return reference.mini_batch(responses, by_name(options), FULL_RESPONSES, MAX_RESPONSE_TOKENS)


def assert_close(got, want, allowed, what: str = "") -> None:
    got, want, allowed = (np.asarray(a, np.float64) for a in (got, want, allowed))
    assert got.shape == want.shape, what
    wrong = ~(np.abs(got - want) <= allowed)
    assert not wrong.any(), f"{what}: {got[wrong]} is not {want[wrong]}"


def assert_agree(loss: torch.Tensor, logp_gradient, entropy_gradient, want: Result, dtype: torch.dtype, what: str = "") -> None:
    """To 1e-12 of the terms that make up each number in float64; in float32 to 2e-6 of them or of 1, whichever is more."""
    if dtype == torch.float64:
        relative, value, gradient = 1e-12, want.largest_value, want.largest_gradient
        allowed = 1e-12 * (want.token_weight * value).sum()
    else:
        relative, value, gradient = 2e-6, np.maximum(1, want.largest_value), np.maximum(1, want.largest_gradient)
        allowed = 2e-6 * min((want.token_weight * value).sum(), value.max(initial=1))
    assert loss.dtype == torch.float64
    assert_close(loss.detach(), want.loss, allowed, f"{what} loss")
    assert_close(logp_gradient, want.logp_gradient, relative * want.token_weight * gradient, f"{what} gradient")
    assert_close(entropy_gradient, want.entropy_gradient, relative * np.abs(want.entropy_gradient), f"{what} gradient to entropy")


def assert_objective_is_the_reference(responses: Sequence[Response], options: AlgorithmOptions, dtype=torch.float64, what="") -> None:
    tokens = as_tokens(responses, dtype)
    loss, _ = objective(tokens, options, totals(responses, options))
    loss.backward()
    assert_agree(loss, tokens.logprobs.grad, tokens.entropy.grad, truth(responses, options), dtype, what)


def assert_tally_is_the_reference(tally: dict[str, tuple[float, float]], want: Result, with_kl: bool, what: str = "") -> None:
    expected = {name: figure for name, figure in reference.figures(want).items() if name != "kl" or with_kl}
    assert set(tally) == set(expected), what
    terms = (want.token_weight * want.largest_value).sum()
    for name, (total, count) in expected.items():
        assert_close(tally[name][0], total, 1e-12 * (terms if "loss" in name else max(abs(total), count)), f"{what} {name}")
        assert_close(tally[name][1], count, 1e-12 * count, f"{what} count of {name}")


def cut(tokens: ObjectiveTokens, chosen: Sequence[int]) -> ObjectiveTokens:
    """The micro-batch of the chosen responses, in that order; its gradients go to the leaves of `tokens`."""
    spans = list(pairwise(tokens.offsets))
    index = torch.tensor([t for i in chosen for t in range(*spans[i])], dtype=torch.int64)
    tensors = {name: value[index] for name, value in tokens.__dict__.items() if isinstance(value, torch.Tensor)}
    lengths = [spans[i][1] - spans[i][0] for i in chosen]
    return ObjectiveTokens(
        **{"ref_logprobs": None} | tensors, offsets=np.cumsum([0, *lengths]).tolist(), names=tuple(tokens.names[i] for i in chosen)
    )


@contextlib.contextmanager
def warnings_are_errors() -> Iterator[None]:
    """Each time, not only the first in the process, which is PyTorch's habit."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        torch.set_warn_always(always)


def flat(value: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """`section.key` and value of a nested mapping."""
    for key, inner in value.items():
        yield from flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) and inner else [(f"{prefix}{key}", inner)]

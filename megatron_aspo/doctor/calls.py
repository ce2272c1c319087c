"""Calls to Ray actors with a time limit that holds whatever the actors do."""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError

from megatron_aspo.common.import_path import one_line

Key = TypeVar("Key", bound=Hashable)
_FETCH_S = 5.0
"""Time to fetch an answer that has arrived; answers are small."""


def gather(calls: Mapping[Key, ray.ObjectRef], limit_s: float) -> tuple[dict[Key, Any], dict[Key, BaseException | None]]:
    """Return the answers, and the failures of the other calls: the exception, or None for a call that has not ended after `limit_s`."""
    ready, _ = ray.wait([*calls.values()], num_returns=len(calls), timeout=limit_s) if calls else ([], [])
    answers, failures, done = {}, {}, set(ready)
    for key, call in calls.items():
        if call not in done:
            failures[key] = None
            continue
        try:
            answers[key] = ray.get(call, timeout=_FETCH_S)
        except GetTimeoutError:
            failures[key] = None
        except Exception as error:
            failures[key] = getattr(error, "cause", None) or error
    return answers, failures


def describe_failure(error: BaseException | None, limit_s: float) -> str:
    """Return why a call has no answer."""
    return f"no answer within {limit_s:g} s" if error is None else one_line(error)

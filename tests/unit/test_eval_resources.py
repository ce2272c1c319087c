"""Defaults of an evaluation that depend on the machine."""

import os
from dataclasses import replace

import psutil
import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.evaluation import resources
from megatron_aspo.evaluation.plan import make_plan
from megatron_aspo.hf.model import read_model
from megatron_aspo.rollout.engine_settings import GIB
from megatron_aspo.rollout.memory import cached_tokens
from megatron_aspo.rollout.options import RolloutOptions
from tests.models import save_tiny

LONG = 100_000
AUTO = RolloutOptions(dtype="float32")


@pytest.fixture
def model(tmp_path):
    save_tiny("qwen3", tmp_path)
    return read_model(tmp_path)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A stand-in for nvidia-smi: this machine may have no GPU."""

    def write(script: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return write


def memory(monkeypatch, available: int) -> None:
    """Let this machine have so many bytes of free memory."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))


@pytest.mark.parametrize(("cores", "gib", "workers"), [(4, 100, 4), (64, 12, 8), (4, 1, 1)])
def test_there_is_a_reward_worker_for_each_core_as_far_as_memory_goes_unless_a_number_is_given(monkeypatch, cores, gib, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    memory(monkeypatch, gib * GIB)
    plan = make_plan("aime24", None, ["aime24.jsonl"], [])
    assert plan.settings.data.reward_workers == workers and plan.changed == {}
    assert make_plan("aime24", None, ["aime24.jsonl"], ["data.reward_workers=3"]).settings.data.reward_workers == 3


def test_engines_on_this_machine_share_its_free_memory_and_those_elsewhere_are_not_limited_by_it(monkeypatch, model):
    memory(monkeypatch, 3 * GIB)
    chosen = [
        resources.with_cache(model, replace(AUTO, engines=engines), False, LONG, "cpu", here)
        for engines, here in ((1, True), (2, True), (2, False))
    ]
    requests = [cached_tokens(model, options) // LONG for options in chosen]
    assert requests[0] == requests[2] == 8 > requests[1] >= 1
    memory(monkeypatch, GIB // 4)
    with pytest.raises(UserError, match=r"an engine's worker has 0\.2 GiB of memory; .* set engine\.tensor_parallel, or lower"):
        resources.with_cache(model, AUTO, False, LONG, "cpu", True)


def test_the_gpu_with_least_free_memory_limits_the_cache(model, smi):
    smi("printf '81000\\n900\\n'")
    assert resources.free_gpu_bytes() == 900 << 20
    assert 1 <= cached_tokens(model, resources.with_cache(model, AUTO, False, LONG, "cuda", True)) // LONG < 8
    smi("exit 9")
    assert resources.free_gpu_bytes() == 0
    assert cached_tokens(model, resources.with_cache(model, AUTO, False, LONG, "cuda", True)) // LONG == 8


def test_a_cache_that_was_given_stays_and_one_that_is_too_small_is_refused(model):
    assert resources.with_cache(model, replace(AUTO, kv_cache_gib=3.0), True, LONG, "cpu", True).kv_cache_gib == 3.0
    with pytest.raises(UserError, match=r"^engine\.kv_cache_gib=0\.01 holds .* raise it to [\d.]+, or lower max_response_tokens$"):
        resources.with_cache(model, replace(AUTO, kv_cache_gib=0.01), True, LONG, "cpu", True)

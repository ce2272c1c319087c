"""`megatron-aspo doctor`, the checks between nodes: pairs, connections, clocks, agreement, placement."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.network import reserved_port
from megatron_aspo.config import Config
from megatron_aspo.doctor.agreement import compare_nodes
from megatron_aspo.doctor.clock import judge_skew, measure_skew
from megatron_aspo.doctor.gpus import gpu_devices
from megatron_aspo.doctor.link import measure_link
from megatron_aspo.doctor.links import Speed, judge_speeds
from megatron_aspo.doctor.local_pair import check_pair
from megatron_aspo.doctor.pairs import pair_rounds
from megatron_aspo.doctor.recipe import NodeCapacity, check_fit, check_placement, run_needs
from megatron_aspo.doctor.record import Record, ok
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.sync.group import TransferError
from megatron_aspo.tasks.options import DataOptions
from tests.models import save_tiny

HOST = "127.0.0.1"
NAMES = ("node a", "node b")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 16])
def test_each_pair_is_tried_once_and_no_node_is_in_two_concurrent_pairs(count):
    plan = pair_rounds(range(count))
    assert sorted(tuple(sorted(pair)) for pairs in plan for pair in pairs) == [*combinations(range(count), 2)]
    assert all(len({*sum(pairs, ())}) == 2 * len(pairs) for pairs in plan)
    assert len(plan) <= count


def both_ends(seconds: float, timeout_s: float = 20.0):
    with reserved_port(HOST) as port, ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(measure_link, HOST, port, rank, NAMES, seconds, timeout_s) for rank in (0, 1)]
        return [end.result() for end in ends]


def test_a_connection_is_measured_in_both_directions_or_only_tried():
    for speed in both_ends(0.1):
        assert 0 < speed.round_trip_s < 1 and speed.bytes_per_s > 1e6
    assert [speed.bytes_per_s for speed in both_ends(0)] == [0, 0]


def test_a_missing_other_end_is_named_in_time():
    started = time.monotonic()
    with reserved_port(HOST) as port, pytest.raises(TransferError, match="node b did not join"):
        measure_link(HOST, port, 0, NAMES, 0, 0.5)
    assert time.monotonic() - started < 5


def test_a_pair_is_slow_in_absolute_terms_or_compared_with_the_others():
    fast, slow = Speed(1e-4, 10e9, 10e9), Speed(1e-4, 10e9, 1e9)
    records = [*judge_speeds({("a", "b"): fast, ("a", "c"): fast, ("b", "c"): slow}, "gloo")]
    assert [record.status for record in records] == ["ok", "ok", "warning"]
    assert records[2].node == "b – c" and "1.00 GB/s back; the median of all pairs is 10.00 GB/s" in records[2].detail
    (record,) = judge_speeds({("a", "b"): Speed(1e-3, 40e6, 40e6)}, "gloo")
    assert record.status == "warning" and "slow for weights" in record.detail and record.cure
    (record,) = judge_speeds({("a", "b"): Speed(1e-3, 0, 0)}, "gloo")
    assert record.status == "ok" and record.detail == "round trip 1.00 ms"


@pytest.mark.parametrize(("ahead", "status"), [(0.2, "ok"), (5.0, "warning"), (-5.0, "warning"), (3600.0, "failed")])
def test_a_wrong_clock_is_detected_despite_slow_round_trips(ahead, status):
    def remote() -> float:
        time.sleep(0.01)
        now = time.time() + ahead
        time.sleep(0.01)
        return now

    found, within = measure_skew(remote)
    assert abs(found - ahead) <= within + 1e-3 and within < 1
    record = judge_skew(found, within)
    assert record.status == status and ("chrony" in record.cure) == (status != "ok")


def test_a_skew_smaller_than_the_round_trip_is_not_reported():
    assert judge_skew(40.0, 39.5).status == "ok"


def facts(**values: str) -> list[Record]:
    return [ok("versions", "", {name: value for name, value in values.items() if name != "model"}), ok("model", "", values)]


def test_nodes_that_differ_from_the_drivers_are_named_with_both_values():
    nodes = {"a": facts(ray="2.60.0", model="1f"), "b": facts(ray="2.60.0", model="1f"), "c": facts(ray="2.59.0", model="2e")}
    same, other = compare_nodes(nodes | {"d": []}, "a")[:2]
    assert (same.node, same.status) == ("b", "ok")
    assert (other.node, other.status) == ("c", "failed")
    assert other.detail == "ray is 2.59.0, on a 2.60.0; model is 2e, on a 1f" and "on c what a has" in other.cure
    missing = compare_nodes(nodes | {"d": []}, "a")[2]
    assert missing.status == "failed" and "ray is missing, on a 2.60.0" in missing.detail


def test_different_gpus_are_a_warning_and_a_different_driver_is_a_failure():
    for name, status in (("kind of GPU", "warning"), ("NVIDIA driver", "failed")):
        (record,) = compare_nodes({"a": [ok("GPUs", "", {name: "one"})], "b": [ok("GPUs", "", {name: "other"})]}, "a")
        assert record.status == status and record.cure


def fit(ranks: int, engines: int, per_engine: int, *devices: int, **changes) -> Record:
    config = replace(Config(model="m"), **changes)
    return check_fit(ranks, engines, per_engine, config, "cuda", [NodeCapacity(count, {"GPU": count}) for count in devices])


@pytest.mark.parametrize(
    ("ranks", "engines", "per_engine", "devices", "status"),
    [
        (8, 2, 4, (8, 8), "ok"),
        (9, 2, 4, (8, 8), "failed"),
        (4, 1, 8, (8, 4), "ok"),
        (4, 1, 8, (6, 6), "failed"),
        (1, 3, 2, (3, 3, 1), "failed"),
    ],
)
def test_engines_need_their_devices_on_one_node(ranks, engines, per_engine, devices, status):
    record = fit(ranks, engines, per_engine, *devices)
    assert record.status == status and bool(record.cure) == (status == "failed")


def test_colocated_engines_need_no_devices_of_their_own_and_reward_workers_need_their_resource():
    assert fit(8, 2, 4, 8, placement="colocated").status == "ok" and fit(8, 2, 4, 8).status == "failed"
    record = fit(1, 1, 1, 8, data=DataOptions(reward_workers=2, reward_resource="cpu_box"))
    assert record.status == "failed" and "cpu_box" in record.detail and "--resources=" in record.cure


def test_a_recipe_is_checked_as_in_a_run_and_its_requirements_are_collected(tmp_path):
    save_tiny("qwen2", tmp_path / "model", tied=True)
    rollout = RolloutOptions(dtype="float32", kv_cache_gib=0.01, max_response_tokens=16)
    config = Config(model=str(tmp_path / "model"), task="single_digit_addition", data=DataOptions(max_prompt_tokens=32), rollout=rollout)
    config = replace(config, trainer=replace(config.trainer, dtype="float32"))
    assert check_placement(config, "cpu", []).status == "ok"
    assert check_placement(config, "cpu", [NodeCapacity(2, {"CPU": 2})]).status == "ok"
    assert check_placement(config, "cpu", [NodeCapacity(1, {"CPU": 1})]).status == "failed"
    with pytest.raises(UserError, match="max_response_tokens"):
        check_placement(replace(config, rollout=replace(rollout, max_response_tokens=10**6)), "cpu", [])
    needs = run_needs(config)
    assert needs.model == str(tmp_path / "model") and needs.code is None and needs.disk_bytes > 0
    with_checkpoints = replace(config, checkpoint=replace(config.checkpoint, every=1))
    assert run_needs(with_checkpoints).disk_bytes > 10 * needs.disk_bytes
    assert run_needs(replace(config, data=DataOptions(reward="code"))).code is not None


def test_a_hub_model_that_is_not_cached_is_a_warning_and_is_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = Config(model="no-such-owner/no-such-model", task="single_digit_addition")
    assert run_needs(config).model == "no-such-owner/no-such-model"
    record = check_placement(config, "cpu", [])
    assert record.status == "warning" and "hf download no-such-owner/no-such-model" in record.cure


def test_two_processes_of_one_machine_connect_and_a_failure_names_its_end():
    """Over gloo, because there may be no GPUs; the processes and their messages are the same."""
    record = check_pair(60, "gloo")
    assert record.status == "ok" and "GPU 0 and GPU 1 exchange" in record.detail
    if not gpu_devices():
        record = check_pair(60)
        assert record.status == "failed" and "GPU 0: " in record.detail and "NCCL_DEBUG=INFO" in record.cure
    assert "do not connect within 0.2 s" in check_pair(0.2, "gloo").detail


@pytest.mark.parametrize(
    ("error", "message", "cure"),
    [
        (None, "no answer within 5 s", "frozen"),
        (
            RuntimeError("creation failed: ModuleNotFoundError: No module named 'megatron_aspo'"),
            "ModuleNotFoundError",
            "install megatron_aspo on b",
        ),
        (RuntimeError("The actor died because its node has died. Node Id: 3af5"), "the node left the cluster", "start it again"),
    ],
    ids=["frozen", "not installed", "dead"],
)
def test_a_node_without_a_doctor_process_is_reported_with_the_cure(error, message, cure):
    from megatron_aspo.doctor.cluster import unresponsive_node  # imports Ray

    record = unresponsive_node("Ray process", "b", error, 5)
    assert record.status == "failed" and message in record.detail and cure in record.cure


@pytest.mark.parametrize(("listed", "given", "status"), [("8", 8, "ok"), ("8", 4, "warning"), ("", 2, "warning")])
def test_gpus_that_ray_does_not_offer_are_reported(listed, given, status):
    from megatron_aspo.doctor.cluster import check_gpus_of_ray

    record = check_gpus_of_ray({"GPU": given}, [ok("GPUs", "", {"number of GPUs": listed} if listed else {})])
    assert record.status == status and f"{given}" in record.detail
    assert check_gpus_of_ray({}, []) is None

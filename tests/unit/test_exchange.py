"""End-to-end transfers over real gloo groups, one thread per rank, compared with the rules of both frameworks written without the table."""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.network import reserved_port
from megatron_aspo.rollout.engine_layout import EngineSizes
from megatron_aspo.rollout.transfer_spec import TransferSpec
from megatron_aspo.sync.endpoints import WeightReceiver, WeightSender
from megatron_aspo.sync.group import StatelessGroup, TransferError, stateless_group
from megatron_aspo.sync.schedule import Schedule
from megatron_aspo.sync.segment import Segment
from megatron_aspo.sync.shared_memory_transport import SharedMemoryTransport
from megatron_aspo.weights.families import tensor_shapes
from megatron_aspo.weights.layout import Box, ModelDims, ParallelSizes, slices
from tests.unit.test_layout import numbered
from tests.unit.test_plan import engine_ids, training_ids, transfers

HOST = "127.0.0.1"
CPU = torch.device("cpu")


def run_ranks(
    spec: TransferSpec, hosts: list[str], work: Callable[[int, StatelessGroup, Schedule], object], timeout_s: float = 20.0
) -> list:
    """Run `work` on every rank of a real group; return the result of each, or the TransferError that it raised."""

    def run(rank: int, port: int):
        group = stateless_group(HOST, port, rank, spec.world, timeout_s, own_host=hosts[rank], names=spec.rank_name, terms=spec.terms())
        try:
            return work(rank, group, spec.schedule(rank, group.hosts))
        except TransferError as error:
            return error
        finally:
            groups.append(group)

    groups: list[StatelessGroup] = []
    with reserved_port(HOST) as port, ThreadPoolExecutor(spec.world) as ranks:
        results = list(ranks.map(lambda rank: run(rank, port), range(spec.world)))
    for group in groups:  # only when all are done: rank 0 serves the store
        group.close()
    return results


def source_of(whole: dict[str, np.ndarray], has: dict[str, set[int]]) -> Callable[[str, Box], torch.Tensor]:
    """Return a function that reads this rank's values, and fails for any others."""

    def read(tensor: str, box: Box) -> torch.Tensor:
        values = whole[tensor][slices(box)]
        assert set(values.ravel().tolist()) <= has[tensor]
        return torch.from_numpy(values)

    return read


def receive_all(receiver: WeightReceiver, version: int, verify: bool, buckets: int) -> dict[str, torch.Tensor]:
    receiver.begin_version(version, verify)
    found = {}
    for _ in range(buckets):
        with receiver.next_bucket() as tensors:
            found |= {name: tensor.clone() for name, tensor in tensors}
    return found


@pytest.mark.long
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(transfers(), st.integers(1, 40), st.booleans())
def test_every_worker_gets_its_part_bit_for_bit_and_nan_elsewhere(transfer, bucket_rows: int, verify: bool):
    family, d, sizes, engines, where = transfer
    whole = numbered(tensor_shapes(family, d))
    spec = TransferSpec(family, d, sizes, engines, "float32", bucket_rows * d.hidden * 4)
    assert TransferSpec.from_dict(spec.as_dict()) == spec

    def work(rank: int, group: StatelessGroup, schedule: Schedule):
        if rank < sizes.world:
            sender = WeightSender(schedule, group, CPU)
            read = source_of(whole, training_ids(family, d, whole, sizes, rank))
            sent = [sender.send_version(read, version, verify) for version in (1, 2)]
            assert sent[0] == sent[1]
            return sent[0]
        receiver = WeightReceiver(schedule, group, CPU)
        assert receive_all(receiver, 1, verify, len(schedule.buckets)).keys() == receiver.tensor_names
        return receive_all(receiver, 2, verify, len(schedule.buckets)), receiver.received_bytes

    results = run_ranks(spec, [f"node {node}" for node in where.node_of], work)
    errors = [result for result in results if isinstance(result, TransferError)]
    assert not errors, errors
    needed = 0
    for worker, (tensors, received) in enumerate(results[sizes.world :]):
        needs = engine_ids(family, d, whole, engines, worker % engines.tensor)
        ids_here = 0
        for name, numbers in whole.items():
            here = np.isin(numbers, list(needs[name]))
            ids_here += int(here.sum())
            if not here.any():
                assert name not in tensors
                continue
            expected = np.where(here, numbers, np.nan).astype(np.float32)
            np.testing.assert_array_equal(tensors[name].numpy(), expected)
        needed += ids_here
        assert received == 2 * 4 * ids_here  # in two versions, float32: these and nothing else
    assert sum(results[: sizes.world]) <= 4 * needed


QWEN2 = ModelDims(layers=2, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=64, tied=True, qkv_bias=True)
PAIR = TransferSpec("Qwen2ForCausalLM", QWEN2, ParallelSizes(pipeline=2), EngineSizes(engines=2), "bfloat16", 1 << 9)


def values(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def view(tensors: dict[str, torch.Tensor]) -> Callable[[str, Box], torch.Tensor]:
    return lambda name, box: tensors[name][slices(box)]


@pytest.mark.parametrize("hosts", [["here"] * 4, ["a", "a", "b", "b"]], ids=["one node", "passed on"])
def test_elements_are_cast_before_they_travel_and_are_sent_to_a_node_once(hosts):
    state = values(tensor_shapes("Qwen2ForCausalLM", QWEN2))

    def work(rank, group, schedule):
        if rank < 2:
            return WeightSender(schedule, group, CPU).send_version(view(state), 1, True)
        received = receive_all(WeightReceiver(schedule, group, CPU), 1, True, len(schedule.buckets))
        assert all(torch.equal(received[name], tensor.bfloat16()) for name, tensor in state.items())
        return None

    results = run_ranks(PAIR, hosts, work)
    assert not [r for r in results if isinstance(r, TransferError)], results
    copies = 2 if hosts[0] == hosts[2] else 1
    assert sum(results[:2]) == copies * 2 * sum(tensor.numel() for tensor in state.values())


class LazyConnections:
    """Makes two ranks of a gloo group connect as under NCCL: the first transfer between them blocks until both have started it."""

    def __init__(self, timeout_s: float):
        self._meetings: defaultdict[tuple[int, int], Barrier] = defaultdict(lambda: Barrier(2, timeout=timeout_s))
        self._lock = Lock()

    def install(self, group: StatelessGroup) -> None:
        start, met = group._start, set()

        def meet_and_start(operation, upward, tensor, peer, lane, description):
            route = (group.rank, peer) if operation == "send" else (peer, group.rank)
            if route not in met:
                met.add(route)
                with self._lock:
                    meeting = self._meetings[route]
                with group.errors_explained(description):
                    meeting.wait()
            return start(operation, upward, tensor, peer, lane, description)

        group._start, group.connects_lazily = meet_and_start, True


def test_ranks_that_connect_at_their_first_transfer_do_not_deadlock():
    state, connections = values(tensor_shapes("Qwen2ForCausalLM", QWEN2)), LazyConnections(5.0)

    def work(rank, group, _):
        connections.install(group)
        # Both engines on one node of which no training rank is: each passes on to the other, as on GPUs through the group.
        schedule = PAIR.schedule(rank, ["a", "a", "b", "b"])
        if rank < 2:
            return WeightSender(schedule, group, CPU).send_version(view(state), 1, True)
        receiver = WeightReceiver(schedule, group, CPU)
        assert {(2, 3), (3, 2)} <= schedule.connections
        received = receive_all(receiver, 1, True, len(schedule.buckets))
        assert all(torch.equal(received[name], tensor.bfloat16()) for name, tensor in state.items())
        return None

    # Different hosts: nothing goes through shared memory.
    results = run_ranks(PAIR, ["1", "2", "3", "4"], work)
    assert not [result for result in results if isinstance(result, TransferError)], results


@pytest.mark.parametrize("hosts", [["here"] * 4, ["a", "a", "b", "c"]], ids=["shared memory", "network"])
def test_corrupted_elements_are_named(hosts):
    state = values(tensor_shapes("Qwen2ForCausalLM", QWEN2))

    def work(rank, group, schedule):
        if rank >= 2:
            return receive_all(WeightReceiver(schedule, group, CPU), 7, True, len(schedule.buckets))
        sender, original = WeightSender(schedule, group, CPU), group.send
        transport = sender._outbox._transports.get(3)

        def send(tensor, target, what, lane=0):
            # A bit flips on the way to engine 1: on the wire, or where it lies after its digest was taken.
            if "model.layers.1." in what and target == 3:
                if "digests" not in what and tensor.dtype == torch.bfloat16:
                    tensor = tensor.clone()
                    tensor.view(torch.uint8)[-1] ^= 1
                elif "digests" in what and isinstance(transport, SharedMemoryTransport):
                    transport._memory ^= 1
            return original(tensor, target, what, lane)

        group.send = send
        return sender.send_version(view(state), 7, True)

    results = run_ranks(PAIR, hosts, work, timeout_s=5.0)
    assert isinstance(results[3], TransferError)
    assert "engine 1 received model." in str(results[3])
    assert "otherwise than training rank 1 sent it" in str(results[3])
    assert "version 7" in str(results[3])


def test_too_little_shared_memory_is_refused_with_the_cure():
    with pytest.raises(UserError, match=r"training rank 3: 1,0.* bytes of shared memory are needed.*; lower transfer_bucket_mib"):
        Segment(10**15, "training rank 3", CPU)


def test_a_silent_rank_is_named_with_the_tensor_that_it_owes():
    state = values(tensor_shapes("Qwen2ForCausalLM", QWEN2))

    def work(rank, group, schedule):
        if rank < 2:
            sender = WeightSender(schedule, group, CPU)
            return sender.send_version(view(state), 3, False) if rank == 0 else None  # stage 1 connects and never sends
        return receive_all(WeightReceiver(schedule, group, CPU), 3, False, len(schedule.buckets))

    results = run_ranks(PAIR, ["here"] * 4, work, timeout_s=1.5)
    assert all(isinstance(result, TransferError) for result in results[2:])
    # Others fail because the waiting ranks have left; the driver reports them all.
    owed = r"engine [01] of the group at .*: bucket \d of 6 of version 3, step 0: model\..* from training rank 1 failed .*timeout 1.5 s"
    assert any(re.match(owed, str(result)) for result in results)


@pytest.mark.parametrize("hosts", [["here"] * 4, ["here", "here", "there", "elsewhere"]], ids=["one machine", "three"])
def test_all_ranks_fail_long_before_the_timeout_when_one_leaves(hosts):
    state = values(tensor_shapes("Qwen2ForCausalLM", QWEN2))

    def work(rank, group, schedule):
        started = time.monotonic()
        try:
            if rank < 2:
                WeightSender(schedule, group, CPU).send_version(view(state), 3, False)
            else:
                receiver = WeightReceiver(schedule, group, CPU)
                receiver.begin_version(3, False)
                for number, _ in enumerate(schedule.buckets):
                    if rank == 3 and number == 1:
                        group.close()
                    with receiver.next_bucket():
                        pass
        except TransferError as error:
            group.close()
            failure = str(error)  # the error itself keeps frames, and with them connections
            return failure, time.monotonic() - started
        return None

    results = run_ranks(PAIR, hosts, work, timeout_s=40.0)
    assert all(result is not None and result[1] < 10.0 for result in results), results
    assert "this rank has left the group" in results[3][0]


def test_all_ranks_fail_long_before_the_timeout_when_a_sender_fails():
    state = values(tensor_shapes("Qwen2ForCausalLM", QWEN2))

    def read(name: str, box: Box) -> torch.Tensor:
        if name.startswith("model.layers.1."):
            raise MemoryError("no room")
        return view(state)(name, box)

    def work(rank, group, schedule):
        started = time.monotonic()
        try:
            if rank < 2:
                senders.append(sender := WeightSender(schedule, group, CPU))
                sender.send_version(read, 3, False)
            else:
                receive_all(WeightReceiver(schedule, group, CPU), 3, False, len(schedule.buckets))
        except MemoryError as error:
            return str(error), time.monotonic() - started
        except TransferError:
            group.close()
            return "failed with it", time.monotonic() - started
        return None

    senders: list[WeightSender] = []  # they live on, as in a training rank
    results = run_ranks(PAIR, ["here"] * 4, work, timeout_s=40.0)
    assert all(result is not None and result[1] < 10.0 for result in results), results
    assert [outcome for outcome, _ in results] == ["failed with it", "no room", "failed with it", "failed with it"]

"""Real gloo groups, one thread per rank."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_aspo.common.network import interface_of, machine, reserved_port
from megatron_aspo.sync.group import TransferError, stateless_group

HOST = "127.0.0.1"


def join_all(world_size: int, timeout_s: float = 20.0):
    with reserved_port(HOST) as port, ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(lambda rank: stateless_group(HOST, port, rank, world_size, timeout_s), range(world_size)))


def test_tensors_arrive_in_order_and_groups_do_not_mix():
    groups, others = join_all(3), join_all(2)

    def pass_round(group, value: float) -> list[torch.Tensor]:
        """Send two tensors to every other rank; return what each of them sent."""
        peers = [rank for rank in range(group.world_size) if rank != group.rank]
        outgoing = [group.send(torch.full((1000,), value + group.rank + part), peer, "part") for peer in peers for part in (0.0, 0.5)]
        incoming = {peer: (torch.empty(1000), torch.empty(1000)) for peer in peers}
        arriving = [group.receive(tensor, peer, "part") for peer in peers for tensor in incoming[peer]]
        for transfer in arriving + outgoing:
            transfer.wait()
        assert all(float(tensor[0]) == value + peer + part for peer in peers for tensor, part in zip(incoming[peer], (0, 0.5), strict=True))
        return [tensor for peer in peers for tensor in incoming[peer]]

    with ThreadPoolExecutor(5) as ranks:
        jobs = [ranks.submit(pass_round, group, value) for value, members in ((100.0, groups), (-100.0, others)) for group in members]
        for job in jobs:
            for tensor in job.result(20):
                assert torch.equal(tensor, tensor[:1].expand(1000))
    for group in groups + others:
        group.close()


def test_every_rank_knows_the_host_of_every_rank():
    with reserved_port(HOST) as port, ThreadPoolExecutor(3) as ranks:
        groups = list(ranks.map(lambda rank: stateless_group(HOST, port, rank, 3, 20.0, own_host=["east", None, "west"][rank]), range(3)))
    assert {group.hosts for group in groups} == {("east", machine(), "west")}
    for group in groups:
        group.close()


def test_sockets_listen_on_the_named_address_only():
    before = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    groups = join_all(2)
    listening = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN} - before
    assert listening
    assert {address.ip for address in listening} == {HOST}
    for group in groups:
        group.close()


def test_missing_ranks_are_named_after_the_timeout():
    absent = r"rank 0 of 3: rank 1, rank 2 did not join the group at 127.0.0.1:\d+ within 0.5 s"
    with reserved_port(HOST) as port, pytest.raises(TransferError, match=absent):
        stateless_group(HOST, port, 0, 3, 0.5)
    with reserved_port(HOST) as port, pytest.raises(TransferError, match=r"rank 2 of 3: rank 0 did not answer at 127.0.0.1"):
        stateless_group(HOST, port, 2, 3, 0.5)


def test_a_transfer_that_the_peer_never_starts_fails_and_is_named():
    sender, receiver = join_all(2, timeout_s=1.0)
    with pytest.raises(TransferError, match=r"rank 1 of the group at .*: bucket 3 \(400 bytes\) from rank 0 failed .* \(timeout 1 s\)"):
        receiver.receive(torch.zeros(100), 0, "bucket 3").wait()
    with pytest.raises(TransferError, match=r"rank 0 of the group at .*: bucket 4 \(400,000,000 bytes\) to rank 1 failed"):
        sender.send(torch.zeros(10**8), 1, "bucket 4").wait()


def test_a_wait_times_out_before_the_watchdog_of_nccl_ends_the_process(monkeypatch):
    given = []

    class Options:
        pass

    class Group:
        def __init__(self, store, rank, world_size, options):
            given.append(options._timeout)

    Group.Options = Options
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with reserved_port(HOST) as port:
        group = stateless_group(HOST, port, 0, 1, 20.0, "nccl")
    assert group.timeout_s == 20 and given == [timedelta(seconds=100)] * 2


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="rank 2 is outside a world of 2"):
        stateless_group(HOST, 1, 2, 2, 1.0)
    with pytest.raises(ValueError, match="backend 'mpi' is not known"):
        stateless_group(HOST, 1, 0, 2, 1.0, "mpi")
    [alone] = join_all(1)
    with pytest.raises(ValueError, match="contiguous"):
        alone.send(torch.zeros(4, 4).T, 0, "a transpose")
    alone.close()


def test_a_rank_that_has_left_says_so():
    [alone] = join_all(1)
    alone.set_value("key", "value")
    assert alone.wait_for_value("key") == "value"
    alone.close()
    with pytest.raises(RuntimeError, match="left the group"):
        alone.set_value("key", "value")


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TransferError, match=f"cannot listen at 127.0.0.1:{port}"):
            stateless_group(HOST, port, 0, 2, 0.5)


def test_a_reserved_port_is_taken_only_by_a_socket_that_asks_for_it():
    with reserved_port(HOST) as port, socket.socket() as other, socket.socket() as listener:
        with pytest.raises(OSError, match="in use"):
            other.bind((HOST, port))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
        socket.create_connection((HOST, port), timeout=5).close()


def test_the_interface_of_an_address_is_found_by_name():
    assert HOST in {entry.address for entry in psutil.net_if_addrs()[interface_of(HOST)]}
    with pytest.raises(ValueError, match=r"no network interface of this machine carries 192.0.2.1; it has .*127.0.0.1"):
        interface_of("192.0.2.1")

"""Real gloo groups, one thread per rank."""

import socket
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from megatron_aspo.weights.group import TransferError, free_port, interface_of, stateless_group

HOST = "127.0.0.1"


def join_all(world_size: int, timeout_s: float = 20.0):
    port = free_port(HOST)
    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(lambda rank: stateless_group(HOST, port, rank, world_size, timeout_s), range(world_size)))


def test_every_rank_receives_what_rank_zero_sends_and_two_groups_do_not_meet():
    groups, others = join_all(3), join_all(2)
    tensors = {(kind, rank): torch.full((1000,), -1.0) for kind in "ab" for rank in range(3)}
    tensors["a", 0] = torch.arange(1000.0)
    tensors["b", 0] = -torch.arange(1000.0)
    with ThreadPoolExecutor(5) as ranks:
        jobs = [ranks.submit(group.broadcast, tensors["a", group.rank]) for group in groups]
        jobs += [ranks.submit(group.broadcast, tensors["b", group.rank]) for group in others]
        for job in jobs:
            job.result(20)
    for rank in range(3):
        assert torch.equal(tensors["a", rank], torch.arange(1000.0))
    assert torch.equal(tensors["b", 1], -torch.arange(1000.0))
    for group in groups + others:
        group.close()


def test_sockets_listen_on_the_named_address_only():
    before = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    groups = join_all(2)
    listening = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN} - before
    assert listening
    assert {address.ip for address in listening} == {HOST}
    for group in groups:
        group.close()


def test_who_is_missing_is_named_when_the_timeout_passes():
    with pytest.raises(TransferError, match=r"rank 0 of 3: rank\(s\) \[1, 2\] did not join the group at 127.0.0.1:\d+ within 0.5 s"):
        stateless_group(HOST, free_port(HOST), 0, 3, 0.5)
    with pytest.raises(TransferError, match=r"rank 2 of 3: rank 0 did not answer at 127.0.0.1"):
        stateless_group(HOST, free_port(HOST), 2, 3, 0.5)


def test_a_broadcast_that_nobody_sends_ends_with_an_error_that_names_it():
    _sender, receiver = join_all(2, timeout_s=1.0)
    with pytest.raises(TransferError, match=r"rank 1 of 2: bucket 3 \(400 bytes\), from rank 0 in the group at .* \(timeout 1 s\)"):
        receiver.broadcast(torch.zeros(100), what="bucket 3")


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="rank 2 is outside a world of 2"):
        stateless_group(HOST, 1, 2, 2, 1.0)
    with pytest.raises(ValueError, match="backend 'mpi' is not known"):
        stateless_group(HOST, 1, 0, 2, 1.0, "mpi")
    [alone] = join_all(1)
    with pytest.raises(ValueError, match="contiguous"):
        alone.broadcast(torch.zeros(4, 4).T)
    alone.close()


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TransferError, match=f"cannot listen at 127.0.0.1:{port}"):
            stateless_group(HOST, port, 0, 2, 0.5)


def test_the_interface_of_an_address_is_found_by_name():
    assert HOST in {entry.address for entry in psutil.net_if_addrs()[interface_of(HOST)]}
    with pytest.raises(ValueError, match=r"no network interface of this machine carries 192.0.2.1; it has .*127.0.0.1"):
        interface_of("192.0.2.1")

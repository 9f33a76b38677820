"""The port at which a learner group meets belongs to it alone, from the moment it is chosen. Sockets and torch's store, no Ray."""

import socket
from datetime import timedelta

import pytest
from torch.distributed import DistNetworkError, TCPStore

from keel.cluster.rendezvous import Rendezvous


@pytest.fixture
def two_ports() -> range:
    with socket.socket() as probe:
        probe.bind(("", 0))
        start = probe.getsockname()[1] // 2  # below those that are handed out
    return range(start, start + 2)


def listens(port: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, 1, True, timedelta(seconds=20))


def test_no_two_groups_have_one_port_and_nobody_else_gets_it(two_ports: range) -> None:
    groups = [Rendezvous(two_ports), Rendezvous(two_ports)]
    assert {group.port for group in groups} == set(two_ports)
    with pytest.raises(OSError, match=f"no port from {two_ports[0]} to {two_ports[1]} is free"):
        Rendezvous(two_ports)
    for host in ("", "127.0.0.1"):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((host, groups[0].port))


def test_rank_0_listens_at_a_port_that_is_still_held(two_ports: range) -> None:
    group = Rendezvous(two_ports)
    store = listens(group.port)
    store.set("rank 0", "is here")
    with pytest.raises(DistNetworkError, match="EADDRINUSE"):
        listens(group.port)
    port = group.port
    del group  # and with it its socket
    assert store.get("rank 0") == b"is here"
    assert {Rendezvous(two_ports).port for _ in range(5)} == set(two_ports) - {port}  # the store has it now

"""The port at which a gang meets belongs to it alone, from the moment it is chosen. Sockets and torch's store, no Ray."""

import socket
from datetime import timedelta

import pytest
from torch.distributed import DistNetworkError, TCPStore

from keel.cluster.rendezvous import MeetingPoint


@pytest.fixture
def two_ports() -> range:
    with socket.socket() as probe:
        probe.bind(("", 0))
        start = probe.getsockname()[1] // 2  # below those that are handed out
    return range(start, start + 2)


def listens(port: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, 1, True, timedelta(seconds=20))


def test_no_two_gangs_have_one_port_and_nobody_else_gets_it(two_ports: range) -> None:
    gangs = [MeetingPoint(two_ports), MeetingPoint(two_ports)]
    assert {gang.port for gang in gangs} == set(two_ports)
    with pytest.raises(OSError, match=f"no port from {two_ports[0]} to {two_ports[1]} is free"):
        MeetingPoint(two_ports)
    for host in ("", "127.0.0.1"):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((host, gangs[0].port))


def test_rank_0_listens_at_a_port_that_is_still_held(two_ports: range) -> None:
    gang = MeetingPoint(two_ports)
    store = listens(gang.port)
    store.set("rank 0", "is here")
    with pytest.raises(DistNetworkError, match="EADDRINUSE"):
        listens(gang.port)
    port = gang.port
    del gang  # and with it its socket
    assert store.get("rank 0") == b"is here"
    assert {MeetingPoint(two_ports).port for _ in range(5)} == set(two_ports) - {port}  # the store has it now

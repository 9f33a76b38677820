"""The address at which the ranks of a learner group meet: a port that no other process can take."""

import random
import socket

import ray

PORTS = range(20_000, 32_000)
"""Ports below the range from which the kernel assigns them and above Ray's own."""


class Rendezvous:
    """A free port on the node of rank 0, held until rank 0 listens there.

    It is bound here without SO_REUSEADDR, so no other socket can have it, and marked as reusable afterwards, so that
    torch's store, which asks for that, can listen at it while it is held: there is no moment in which it is free.
    """

    def __init__(self, ports: range = PORTS) -> None:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        for port in random.sample(ports, min(len(ports), 100)):
            held = socket.socket(family)
            if family == socket.AF_INET6:
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                held.bind(("", port))
            except OSError:  # taken
                held.close()
                continue
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._held, self.port = held, port
            return
        raise OSError(f"no port from {ports.start} to {ports.stop - 1} is free")

    def where(self) -> tuple[str, int]:
        """Address of the node, and the port."""
        return ray.util.get_node_ip_address(), self.port

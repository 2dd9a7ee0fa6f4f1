"""Ports for programs that must be told theirs, and that bind them later than they are chosen."""

from __future__ import annotations

import contextlib
import random
import socket

PORTS = range(20_000, 32_000)
"""Below those that systems give to clients' connections, one of which might get a port before its server binds it."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port = random.choice(PORTS)
            with contextlib.suppress(OSError):  # it is taken
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return found

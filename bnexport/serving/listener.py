"""Listening sockets: bound before any model is loaded, and closed without resetting clients."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

from bnexport.errors import UsageError
from bnexport.optional import one_line

_SO_ATTACH_FILTER, _BPF_RETURN = 26, 0x06


def bound(host: str, port: int, *, reuse: bool = False) -> socket.socket:
    """Return a bound socket, so that the port is known before anything is loaded."""
    with _refusing(host, port, "--port"):
        family, _ = resolved(host, port)
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=reuse)


def free_port(host: str, port: int, *, reuse: bool = False, option: str = "--port") -> int:
    """Return a port that a server can listen on. Nothing listens on it yet, so no client can connect too early."""
    with _refusing(host, port, option):
        family, address = resolved(host, port)
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])


def resolved(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return family and address of a name; both servers use the first of several."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return found[0], found[4]


@contextlib.contextmanager
def _refusing(host: str, port: int, option: str) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError, UnicodeError, ValueError) as error:
        # create_server adds words to the system's message.
        reason = os.strerror(number) if (number := getattr(error, "errno", None) or 0) > 0 else one_line(error)
        raise UsageError(
            f"{host} port {port} can't be used: {reason}", remedy=f"Choose another --host or {option}"
        ) from error


def deafen(listener: socket.socket) -> bool:
    """Make the system drop new clients' packets to a listening socket, so that its backlog stays empty after it was emptied.

    The clients try again after a second, and are refused then or reach another server. (Linux, socket(7): SO_ATTACH_FILTER with
    a program of one instruction, which keeps no byte of any packet. Existing connections are not affected.) Return False if the
    system can't do this: a client may then be reset in the microseconds before the socket closes.
    """
    if not sys.platform.startswith("linux"):
        return False
    program = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, 0))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(program)))
    except OSError:
        return False
    return True


def backlog(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield connections that the system has established and no process has accepted."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:  # none is left
            return
        client.setblocking(False)
        yield client

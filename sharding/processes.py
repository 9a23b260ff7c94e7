"""The processes of one model: commands from process 0 to the others, and the end of all when one of them dies.

Over TCP connections of our own, from every process to process 0. They carry the arguments of each step in one message
without a round trip, and the operating system closes them when a process dies, however it dies, so that the others
know at once, even while they wait in a collective that will never end. The coordination service of jax.distributed,
which introduces the processes to each other, would need a key for every step, polling, and a heartbeat's timeout.

Only processes of one job exchange messages (see messages.py): who connects must name a secret that the coordination
service keeps.
"""

from collections.abc import Callable, Iterable
import hmac
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed  # its key-value store has no public name yet

from sharding.messages import Receiver, Sender

HEARTBEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 30.0
"""Seconds without one after which a process counts as dead, for hosts that fall off the network."""

_PATIENCE = 24 * 3600  # a process that dies meanwhile is noticed otherwise

_LENGTH = struct.Struct("!Q")
_KEY = "slora-jax/processes"
_CLOSE = b"close"


def die(message: str) -> None:
    """Ends this process now. Other threads may wait in a collective that no exception reaches."""
    print(f"slora-jax: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class Processes:
    """This process and its connections. `receive` is for processes other than 0, `send` for process 0."""

    def __init__(self, index: int, sockets: dict[int, socket.socket], on_loss: Callable[[str], Any] = die):
        """sockets: connections by the number of the process at their other end."""
        self.index = index
        self._sockets = sockets
        self._on_loss = on_loss
        self._locks = {peer: threading.Lock() for peer in sockets}
        self._sender, self._receiver = Sender(), Receiver()
        self._meetings = 0
        self._commands: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._gone: set[int] = set()  # those that said goodbye
        for peer, connection in sockets.items():
            connection.settimeout(SILENCE)
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, message: Any) -> None:
        """Sends an object to all other processes; see Sender.encode for what it may hold."""
        for peer in self._gone:
            self._lost(peer, "it said goodbye")
        frames = self._sender.encode(message)
        for peer in self._sockets:
            self._send_frames(peer, frames)

    def receive(self, types: Iterable[type] = ()) -> Any:
        """The next object that process 0 sent, or None after it has closed. types: dataclasses that it may hold."""
        frames = self._commands.get()
        return None if frames is None else self._receiver.decode(frames, types)

    def meet(self) -> None:
        """Waits until all processes are here, however long one of them loads or compiles before. Some collectives
        give up after half a minute (Gloo's on CPUs), so call it in front of a first one.
        """
        self._meetings += 1
        client = distributed.global_state.client
        assert client is not None, "join has used it"
        client.wait_at_barrier(f"{_KEY}/{self._meetings}", _PATIENCE * 1000)

    def close(self) -> None:
        """Says goodbye. The other processes' `receive` returns None."""
        if not self._closed.is_set():
            self._closed.set()
            for peer in self._sockets:
                self._send_frames(peer, [_CLOSE])

    def _send_frames(self, peer: int, frames: list[bytes]) -> None:
        if peer in self._gone:
            return
        lengths = b"".join(_LENGTH.pack(len(f)) for f in frames)
        try:
            with self._locks[peer]:
                self._sockets[peer].sendall(b"".join([_LENGTH.pack(len(frames)), lengths, *frames]))
        except OSError as error:
            self._lost(peer, str(error))

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT):
            for peer in self._sockets:
                self._send_frames(peer, [])

    def _listen(self, peer: int, connection: socket.socket) -> None:
        try:
            while True:
                frames = _read_frames(connection)
                if frames == [_CLOSE]:
                    self._gone.add(peer)
                    self._commands.put(None)
                    return
                if frames:
                    self._commands.put(frames)
        except TimeoutError:
            self._lost(peer, f"nothing was heard of it for {SILENCE:g} seconds")
        except (OSError, EOFError) as error:
            self._lost(peer, str(error))

    def _lost(self, peer: int, why: str) -> None:
        if not self._closed.is_set():
            self._on_loss(f"process {peer} has ended ({why}); process {self.index} ends too")


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = connection.recv_into(view[at:])
        if not got:
            raise EOFError("its connection was closed")
        at += got
    return bytes(data)


def _read_frames(connection: socket.socket) -> list[bytes]:
    (count,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    lengths = [_LENGTH.unpack(_read(connection, _LENGTH.size))[0] for _ in range(count)]
    return [_read(connection, n) for n in lengths]


_joined: Processes | None = None


def join(timeout: float = 60.0) -> Processes:
    """Connects the processes of jax.distributed, once. Raises TimeoutError if one does not come."""
    global _joined
    if _joined is None:
        state = distributed.global_state
        client, address = state.client, state.coordinator_address
        if client is None or address is None:
            raise RuntimeError("several processes need jax.distributed.initialize first; use python -m sharding.launch")
        if jax.process_index() == 0:
            sockets = _accept(client, jax.process_count(), timeout)
        else:
            sockets = {0: _connect(client, address.rsplit(":", 1)[0].strip("[]"), jax.process_index(), timeout)}
        _joined = Processes(jax.process_index(), sockets)
    return _joined


def _accept(client: Any, count: int, timeout: float) -> dict[int, socket.socket]:
    token = secrets.token_hex(16)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    deadline = time.monotonic() + timeout
    found: dict[int, socket.socket] = {}
    with socket.create_server(
        ("", 0), family=family, backlog=count, dualstack_ipv6=family == socket.AF_INET6
    ) as server:
        client.key_value_set(_KEY, f"{server.getsockname()[1]} {token}")
        while len(found) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, count)) - found.keys())
                raise TimeoutError(f"processes {missing} did not connect within {timeout:g} seconds") from None
            connection.settimeout(5)
            try:
                hello = _read(connection, len(token) + _LENGTH.size)
            except (OSError, EOFError):
                hello = b""
            (index,) = _LENGTH.unpack(hello[-_LENGTH.size :]) if len(hello) > _LENGTH.size else (0,)
            if hmac.compare_digest(hello[: len(token)], token.encode()) and 0 < index < count and index not in found:
                found[index] = _prepared(connection)
            else:
                connection.close()
    return found


def _connect(client: Any, host: str, index: int, timeout: float) -> socket.socket:
    port, token = client.blocking_key_value_get(_KEY, int(timeout * 1000)).split()
    connection = socket.create_connection((host, int(port)), timeout)
    connection.sendall(token.encode() + _LENGTH.pack(index))
    return _prepared(connection)


def _prepared(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection

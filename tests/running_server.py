"""A server on a real socket, for tests of what happens there."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time

from slora_jax import SloraError
from slora_jax.server import Service
from slora_jax.server.serve import Server


class Running:
    """A server on a port of its own, in a thread of its own."""

    def __init__(self, service: Service):
        self.service = service
        self.error: BaseException | None = None
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.server: Server | None = None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.thread.start()
        wait_until(lambda: service.phase != "loading" or not self.thread.is_alive())

    async def _run(self) -> None:
        self.server = Server(self.service, log_level=None)
        try:
            await self.server.serve([self._socket])
        except SloraError as error:
            self.error = error
        finally:
            self._socket.close()

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def post(self, body: dict | bytes, path="/v1/completions", **headers) -> http.client.HTTPConnection:
        """Sends a call and leaves its answer unread."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", path, data, {"content-type": "application/json"} | headers)
        return connection

    def metric(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)

"""The server's process: it listens at once, loads the engine meanwhile, and drains when it is told to stop."""

import asyncio
import gc
import logging.config
import socket
import sys
from types import FrameType

import uvicorn

from slora_jax.server.app import create_app
from slora_jax.server.logs import log_config
from slora_jax.server.protocol import guarded_protocol
from slora_jax.server.service import Service

logger = logging.getLogger(__name__)

# For which a thread may keep Python to itself while others want it; Python's own 5 ms are longer than an engine's whole
# work for a step, and the event loop and the engine's thread need Python often and briefly.
_SWITCH_SECONDS = 0.0005


class Server(uvicorn.Server):
    """uvicorn with a service. The first signal drains it and the second ends it at once."""

    def __init__(self, service: Service, *, log_level: str | None = "INFO", alone: bool = False):
        """log_level: None leaves logging alone. alone: the process is the server's own, and set up for it."""
        config = service.config
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=config.host,
                port=config.port,
                http=guarded_protocol(config.header_seconds),
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=log_config(log_level) if log_level else None,
                server_header=False,
                proxy_headers=False,  # nothing here depends on where a call comes from
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=64 << 10,
            )
        )
        self._service = service
        self._alone = alone
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._stopping = False
        self.failure: BaseException | None = None  # why the engine could not be loaded

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stopping:
            super().handle_exit(sig, frame)
        else:
            self.stop()

    def stop(self) -> None:
        """Begins the shutdown: no new calls, and an end when those in flight are answered. From any thread."""
        self._stopping = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Runs until it is stopped. Raises what kept the engine from being loaded."""
        self._loop = asyncio.get_running_loop()
        life = asyncio.create_task(self._live())
        try:
            await super().serve(sockets)
        finally:
            self._loop = None
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
            await self._service.close()
        if self.failure is not None:
            raise self.failure

    async def _live(self) -> None:
        loading = asyncio.create_task(self._service.load())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is not None:
            self.failure = loading.exception()
        else:
            if self._alone:
                _settle()
            await stopping
            await self._service.drain()
            await self._service.close()  # what is left ends now, and its callers are told
            if not loading.done():  # the thread that loads cannot be stopped; nobody waits for what it makes
                loading.cancel()
        stopping.cancel()
        self.should_exit = True


def run(service: Service, *, log_level: str = "INFO") -> None:
    """Runs a server until a signal ends it. Raises what kept it from starting."""
    logging.config.dictConfig(log_config(log_level))
    host = f"[{service.config.host}]" if ":" in service.config.host else service.config.host
    logger.info("listening", extra={"fields": {"url": f"http://{host}:{service.config.port}"}})
    # uvloop, where there is one: an event loop in C, which writes hundreds of streams with half of asyncio's time
    asyncio.run(_run(service, log_level), loop_factory=uvicorn.Config("", loop="auto").get_loop_factory())


async def _run(service: Service, log_level: str) -> None:
    await Server(service, log_level=log_level, alone=True).serve()


def _settle() -> None:
    """Sets the process up for serving, now that the engine is loaded."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    # what there is now stays; to look through all of it for garbage again and again would stop everybody for a while
    gc.collect()
    gc.freeze()

"""Several replicas of the server behind Ray Serve, each request where its adapter already is.

    pip install "slora-jax[server,ray]"
    serve run examples.ray_serve.app:build model=MODEL adapters=DIR min_replicas=2 max_replicas=4

Ray's own model multiplexing does the routing: the door reads the call's `model` and names it as the multiplexed model;
Ray sends the call to a replica that has used that adapter lately, if it is not too busy, and to another one otherwise.
Each replica is a whole server in its process, which answers as `slora-jax serve` does.
"""

import asyncio
from collections.abc import AsyncIterator
import json
from pathlib import Path
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

ADAPTERS_A_REPLICA = 32  # that Ray takes to be at home on one replica; the least recently used gives way


@serve.deployment(ray_actor_options={"num_cpus": 1})
class Replica:
    """A server without a socket. model, adapters: as of `slora-jax serve`. engine: fields of EngineConfig."""

    def __init__(self, model: str, adapters: str, engine: dict[str, Any] | None = None):
        from slora_jax import Engine, EngineConfig
        from slora_jax.server import ServerConfig, Service, create_app

        config = ServerConfig(model_name="base", adapters=Path(adapters), host="localhost")
        settings = EngineConfig(**(engine or {}))
        self._service = Service(config, lambda: Engine.from_pretrained(model, settings))
        self._app = create_app(self._service)
        self._loading: asyncio.Task[None] | None = None
        self._name = serve.get_replica_context().replica_id.unique_id

    async def check_health(self) -> None:
        """Ray's; it also begins to load, which needs the replica's event loop."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._service.load())
        if self._loading.done():
            self._loading.result()  # raises what kept it from loading, and Ray starts another replica

    @serve.multiplexed(max_num_models_per_replica=ADAPTERS_A_REPLICA)
    async def at_home(self, model: str) -> str:
        """Ray remembers by this which adapters the replica has. The engine itself loads them when they are needed."""
        return model

    async def call(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> AsyncIterator[Any]:
        """The answer to a call: (status, headers), then its body in pieces."""
        await self.check_health()
        assert self._loading is not None
        await self._loading
        if model := serve.get_multiplexed_model_id():
            await self.at_home(model)
        pieces: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # the client is still there until this call is cancelled
            given = True
            return {"type": "http.request", "body": body}

        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"host", b"localhost"), *headers], "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        answering = asyncio.create_task(self._app(scope, receive, pieces.put))
        try:
            start = await pieces.get()
            yield start["status"], [*start["headers"], (b"x-replica", self._name.encode())]
            while True:
                piece = await pieces.get()
                yield piece.get("body", b"")
                if not piece.get("more_body"):
                    return
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Door:
    """Takes calls and passes each on, with the adapter it names. API keys would be checked here."""

    def __init__(self, replicas: serve.handle.DeploymentHandle):
        self._replicas = replicas

    async def __call__(self, request: Request) -> StreamingResponse:
        body = await request.body()
        try:
            named = json.loads(body).get("model")
        except (ValueError, AttributeError):  # the replica says what is wrong with it
            named = None
        model = named if isinstance(named, str) and len(named) <= 256 else ""
        replicas = self._replicas.options(stream=True, multiplexed_model_id=model)
        kept = [(name, value) for name, value in request.headers.raw if name in (b"content-type", b"x-request-id")]
        answer = aiter(replicas.call.remote(request.method, request.url.path, kept, body))
        status, headers = await anext(answer)
        response = StreamingResponse(answer, status)
        response.raw_headers = headers
        return response


def build(args: dict[str, str]) -> serve.Application:
    """The application. Arguments: model, adapters (a directory), min_replicas, max_replicas, gpus (of a replica)."""
    low, high = int(args.get("min_replicas", 2)), int(args.get("max_replicas", 2))
    replicas = Replica.options(
        autoscaling_config=dict(min_replicas=low, max_replicas=max(low, high), target_ongoing_requests=64),
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 1, "num_gpus": float(args.get("gpus", 0))},
        health_check_timeout_s=600,
    )
    engine = json.loads(args.get("engine", "{}"))
    return Door.bind(replicas.bind(args["model"], args["adapters"], engine))

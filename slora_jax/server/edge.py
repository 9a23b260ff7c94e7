"""What every call passes first: a request id, who is calling, a bounded body, one line in the log."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slora_jax.server.config import ServerConfig
from slora_jax.server.errors import ApiError
from slora_jax.server.metrics import Metrics
from slora_jax.server.tenants import Tenants
from slora_jax.server.tracing import Tracing
from slora_jax.server.turnstile import Turnstile

logger = logging.getLogger(__name__)

PUBLIC = frozenset(("/", "/health", "/ready", "/version"))
ADMIN = frozenset(
    ("/metrics", "/status", "/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
     "/v1/pin_lora_adapter", "/v1/unpin_lora_adapter", "/v1/prefetch_lora_adapter")
)  # fmt: skip

# paths that a span is named after; a stranger's paths would be names without end
_TRACED = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/generate", "/generate_stream",
     "/tokenize", "/detokenize", *ADMIN)
)  # fmt: skip
_AT_ONCE = 8  # calls that begin in one turn of the event loop, about a millisecond each
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Edge:
    """ASGI middleware. It reads the whole body before the application sees the call, so that nobody without a key has
    anything parsed, and no handler meets a body that is too large, too slow or cut short.
    """

    def __init__(
        self, app: ASGIApp, config: ServerConfig, tenants: Tenants, metrics: Metrics, tracing: Tracing | None = None
    ):
        self._app = app
        self._config = config
        self._tenants = tenants
        self._metrics = metrics
        self._tracing = tracing
        self._turnstile = Turnstile(_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        fields: dict[str, object] = {"request_id": request_id, "method": scope["method"], "path": scope["path"][:200]}
        quiet = scope["path"] in PUBLIC or scope["path"] in ("/metrics", "/status")
        with contextlib.ExitStack() as stack:
            if self._tracing is not None and not quiet:
                path = scope["path"] if scope["path"] in _TRACED else "other"
                stack.enter_context(self._tracing.call(scope["method"], path, headers, fields))
            await self._answer(scope, receive, send, headers, fields)
        # no query among the fields: a key may have been put there by mistake
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], fields: dict[str, Any]
    ) -> None:
        """Has the application answer, and notes in `fields` what came of it."""
        start = time.monotonic()
        fields["status"] = 499  # the client left before there was an answer
        scope.setdefault("state", {}).update(request_id=fields["request_id"], log=fields)

        async def send_tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", fields["request_id"].encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            try:
                tenant = self._authorise(scope["path"], headers)
                if tenant is not None:
                    scope["state"]["tenant"] = tenant
                    fields["tenant"] = tenant.key.name
                body = await self._read_body(headers, receive)
                if scope["path"] not in PUBLIC:
                    await self._turnstile.enter()
            except ApiError as error:
                self._metrics.refused(error.code or str(error.status))
                await error.response()(scope, receive, send_tagged)
                return
            if body is not None:
                await self._app(scope, _replay(body, receive), send_tagged)
        except Exception:  # a mistake of ours: it is told here, because only here the call has an id
            request_id = fields["request_id"]
            logger.exception("the call failed", extra={"fields": {"request_id": request_id}})
            if fields["status"] == 499:
                failure = ApiError(500, f"something went wrong in the server; its log says what under {request_id}")
                await failure.response()(scope, receive, send_tagged)
        finally:
            fields["seconds"] = round(time.monotonic() - start, 4)
            self._metrics.responded(fields["status"])

    def _authorise(self, path: str, headers: dict[str, str]):
        if path in PUBLIC:
            return None
        tenant = self._tenants.authenticate(headers.get("authorization"), headers.get("host"))
        if path in ADMIN and not tenant.key.admin:
            raise ApiError(403, "this call needs an administrator's key", code="admin_only")
        return tenant

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The body; None if the client left while sending it."""
        limit = self._config.max_body
        too_large = ApiError(413, f"the body is larger than the {limit} bytes allowed", code="body_too_large")
        length = headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 19 and int(length) > limit:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._config.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        raise too_large
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._config.body_seconds:g} seconds", code="body_too_slow"
            ) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body and then whatever the client does next, which is to leave."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

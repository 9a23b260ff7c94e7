"""Adapters come and go: vLLM's calls, and a list of what is there. For administrators."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from slora_jax.errors import AdapterError, CapacityError, SloraError
from slora_jax.server.adapter_manager import LoadingNotAllowed, UnknownAdapter
from slora_jax.server.depends import ServiceDep, log_field
from slora_jax.server.errors import ApiError
from slora_jax.server.paths import NameRefused
from slora_jax.server.schemas import AdapterNameBody, LoadAdapterBody, UnloadAdapterBody
from slora_jax.server.service import Service

router = APIRouter()


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapterBody, request: Request, service: ServiceDep) -> Response:
    """Loads an adapter that lies under the server's --load-root."""
    service.check_accepting()
    log_field(request, adapter=body.lora_name[:200])
    if seconds := service.loads.wait(1):
        most = service.config.max_loads_per_minute
        raise ApiError(
            429, f"this server loads {most:g} adapters a minute", code="rate_limit_exceeded", retry_after=seconds
        )
    service.loads.take(1)
    try:
        # not cancelled when the client leaves: an adapter is there, or it is not
        await asyncio.to_thread(service.adapters.load, body.lora_name, body.lora_path, body.load_inplace)
    except LoadingNotAllowed as error:
        raise ApiError(403, str(error), code="loading_not_allowed") from None
    except NameRefused as error:
        raise ApiError(400, str(error), param="lora_name") from None
    except (AdapterError, CapacityError) as error:
        raise ApiError(400, str(error), param="lora_path") from None
    except SloraError as error:
        raise ApiError(500, str(error)) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadAdapterBody, request: Request, service: ServiceDep) -> Response:
    """Forgets an adapter. Requests in flight are answered as they began."""
    service.check_accepting()
    log_field(request, adapter=body.lora_name[:200])
    try:
        await asyncio.to_thread(service.adapters.unload, body.lora_name)
    except UnknownAdapter as error:
        raise ApiError(404, str(error), param="lora_name") from None
    except SloraError as error:
        raise ApiError(500, str(error)) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/v1/pin_lora_adapter")
async def pin_lora_adapter(body: AdapterNameBody, request: Request, service: ServiceDep) -> Response:
    """Keeps an adapter in host memory, and in pages for as long as anything else that is idle can go instead."""
    await _keep(body, request, service, service.engine.pin_adapter)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' pinned.")


@router.post("/v1/unpin_lora_adapter")
async def unpin_lora_adapter(body: AdapterNameBody, request: Request, service: ServiceDep) -> Response:
    """The adapter may leave like any other again."""
    await _keep(body, request, service, service.engine.unpin_adapter)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' unpinned.")


@router.post("/v1/prefetch_lora_adapter")
async def prefetch_lora_adapter(body: AdapterNameBody, request: Request, service: ServiceDep) -> Response:
    """Brings an adapter to host memory, and to pages when some are free. Answers when it is in host memory."""
    await _keep(body, request, service, lambda name: service.engine.prefetch_adapter(name).result())
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' prefetched.")


async def _keep(body: AdapterNameBody, request: Request, service: Service, change: Callable[[str], None]) -> None:
    service.check_accepting()
    log_field(request, adapter=body.lora_name[:200])
    if not service.adapters.serves(body.lora_name):
        raise ApiError(404, f"no adapter {body.lora_name[:200]!r} is served", param="lora_name")
    try:
        await asyncio.to_thread(change, body.lora_name)
    except SloraError as error:
        raise ApiError(400, service.adapters.without_paths(str(error)) or "", param="lora_name") from None


@router.get("/v1/adapters")
async def adapters(service: ServiceDep) -> dict[str, Any]:
    """Every adapter: where its weights are (tier device, host or disk), rank, digest (once they were read), pages, use,
    and any error.
    """
    return {"object": "list", "data": await asyncio.to_thread(service.adapters.describe)}

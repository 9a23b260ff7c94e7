"""Adapters come and go: vLLM's calls, and a list of what is there. For administrators."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from slora_jax.errors import AdapterError, CapacityError, SloraError
from slora_jax.server.adapter_manager import LoadingNotAllowed, UnknownAdapter
from slora_jax.server.depends import ServiceDep, log_field
from slora_jax.server.errors import ApiError
from slora_jax.server.paths import NameRefused
from slora_jax.server.schemas import LoadAdapterBody, UnloadAdapterBody

router = APIRouter()


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapterBody, request: Request, service: ServiceDep) -> Response:
    """Loads an adapter that lies under the server's --load-root."""
    service.check_accepting()
    log_field(request, adapter=body.lora_name[:200])
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


@router.get("/v1/adapters")
async def adapters(service: ServiceDep) -> dict[str, Any]:
    """Every adapter: where its weights are (tier device, host or disk), rank, digest (once they were read), pages, use,
    and any error.
    """
    return {"object": "list", "data": await asyncio.to_thread(service.adapters.describe)}

"""What handlers are given: the service, and who is calling."""

from typing import Annotated

from fastapi import Depends, Request

from slora_jax.server.service import Service
from slora_jax.server.tenants import Tenant


# async, because FastAPI sends every other function through a thread
async def _service(request: Request) -> Service:
    return request.app.state.service


async def _tenant(request: Request) -> Tenant:
    return request.state.tenant


def log_field(request: Request, **fields: object) -> None:
    """Adds to the call's line in the log. Never text of a prompt or an answer."""
    request.state.log.update(fields)


ServiceDep = Annotated[Service, Depends(_service)]
TenantDep = Annotated[Tenant, Depends(_tenant)]

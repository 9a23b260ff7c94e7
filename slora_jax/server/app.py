"""The application: every route behind the edge, every error in OpenAI's form."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import slora_jax
from slora_jax.errors import SloraError
from slora_jax.server import (
    routes_adapters,
    routes_embeddings,
    routes_openai,
    routes_operation,
    routes_slora,
    routes_tokens,
)
from slora_jax.server.edge import Edge
from slora_jax.server.errors import ApiError
from slora_jax.server.service import Service


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service. Who makes it also calls service.load and service.close."""
    app = FastAPI(
        title="slora-jax",
        version=slora_jax.__version__,
        docs_url=None,  # those pages fetch scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for module in (routes_openai, routes_embeddings, routes_slora, routes_tokens, routes_adapters, routes_operation):
        app.include_router(module.router)
    app.add_middleware(
        Edge, config=service.config, tenants=service.tenants, metrics=service.metrics, tracing=service.tracing
    )
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(SloraError, _engine_error)
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.app.state.service.metrics.refused(error.code or str(error.status))
    return error.response()


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _api_error(request, _explain(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    """What FastAPI itself refuses: unknown paths, wrong methods, bodies that cannot be decoded."""
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _engine_error(request: Request, error: Exception) -> Response:
    """Errors of a user's are caught where the field is known; here the engine was closed under a call."""
    return await _api_error(request, ApiError(503, str(error), code="unavailable", retry_after=5))


def _explain(errors: Sequence[Any]) -> ApiError:
    """The first error in words. Of a field with several forms, pydantic tells one for each form."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    where = [str(part) for part in first["loc"][1:]]
    if not where:
        return ApiError(400, "the body must be a JSON object, sent with content-type application/json")
    param = where[0][:64]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(where)[:128]} is not known, or not supported by this server", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{'.'.join(where)[:128]} is missing", param=param)
    if sum(error["loc"][1:2] == first["loc"][1:2] for error in errors) > 1:
        return ApiError(400, f"{param} has a wrong form: {first['msg']}, for instance", param=param)
    return ApiError(400, f"{'.'.join(where)[:128]}: {first['msg']}", param=param)

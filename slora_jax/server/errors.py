"""Errors as OpenAI's API shows them."""

import math
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told instead of an answer.

    param: the field of the request that is wrong. retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def unknown_model(name: str) -> ApiError:
    """The same for a model that is not there and one that the caller may not use, so that neither can be told."""
    shown = name if len(name) <= 64 else name[:63] + "…"
    return ApiError(
        404,
        f"the model {shown!r} does not exist or you may not use it; GET /v1/models lists what you may use",
        param="model",
        code="model_not_found",
    )

"""OpenAI's embeddings: texts become vectors, under an adapter or the base model."""

import base64
from typing import Any

from fastapi import APIRouter, Request
import numpy as np
from starlette.responses import Response

from slora_jax.errors import AdapterError, CapacityError, RequestError
from slora_jax.requests import EmbeddingOutput, EmbeddingRequest
from slora_jax.server.answering import choose_adapter, encode_prompts
from slora_jax.server.depends import ServiceDep, TenantDep, log_field
from slora_jax.server.errors import ApiError, unknown_model
from slora_jax.server.events import answer_unless_gone
from slora_jax.server.sampling import bad_request
from slora_jax.server.schemas import EmbeddingBody
from slora_jax.server.service import Service
from slora_jax.server.tenants import Tenant

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """The final hidden state at each input's last token, of length 1."""
    service.check_accepting()
    adapter = choose_adapter(service, tenant, body.model)
    log_field(request, model=body.model)
    size = service.engine.model.config.hidden_size
    if body.dimensions not in (None, size):
        message = f"dimensions must be {size} or left out: this model's vectors are not made to be cut"
        raise ApiError(400, message, param="dimensions")
    inputs, most = body.inputs(), service.config.max_inputs
    if len(inputs) > most:
        raise ApiError(400, f"a call may have {most} inputs, not {len(inputs)}", param="input")
    prompts = await encode_prompts(service, inputs, body.add_special_tokens, param="input")
    requests = [
        EmbeddingRequest(None, adapter, ids, request_id=f"embd-{request.state.request_id}-{i}", tenant=tenant.key.name)
        for i, ids in enumerate(prompts)
    ]

    async def answer() -> dict[str, Any]:
        outputs = await _embed(service, tenant, requests)
        tokens = sum(map(len, prompts))
        log_field(request, prompt_tokens=tokens)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": _written(output, body.encoding_format)}
                for i, output in enumerate(outputs)
            ],
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return await answer_unless_gone(request, answer())


async def _embed(service: Service, tenant: Tenant, requests: list[EmbeddingRequest]) -> list[EmbeddingOutput]:
    """A long list goes through the engine in parts, so that it takes no more places than a call may have."""
    places = min(len(requests), service.config.max_prompts, tenant.key.max_concurrent or len(requests))
    outputs: list[EmbeddingOutput] = []
    with service.admit(tenant, places):
        for start in range(0, len(requests), places):
            try:
                done = await service.engine.aembed(requests[start : start + places])
            except AdapterError:  # unloaded since it was looked up
                raise unknown_model(requests[0].adapter or "") from None
            except (RequestError, CapacityError) as error:
                raise bad_request(error, "input") from None
            for output in done:
                service.embedded(output, tenant)
                if output.error is not None:
                    reason = service.adapters.without_paths(output.error)
                    raise ApiError(500, reason or "the embedding failed", code="embedding_failed")
            outputs += done
    if requests[0].adapter is not None:
        service.adapters.touch(requests[0].adapter)
    return outputs


def _written(output: EmbeddingOutput, form: str | None) -> list[float] | str:
    """Numbers, or base64 of little-endian float32."""
    assert output.embedding is not None
    if form == "base64":
        return base64.b64encode(output.embedding.astype(np.dtype("<f4")).tobytes()).decode()
    return output.embedding.tolist()

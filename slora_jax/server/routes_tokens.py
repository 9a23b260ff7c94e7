"""Text to token ids and back, as vLLM has it."""

import asyncio
from typing import Any

from fastapi import APIRouter

from slora_jax.errors import RequestError
from slora_jax.server.answering import choose_adapter, encode_chat, encode_prompts, tokenizer_of
from slora_jax.server.depends import ServiceDep, TenantDep
from slora_jax.server.errors import ApiError
from slora_jax.server.sampling import bad_request
from slora_jax.server.schemas import DetokenizeBody, TokenizeBody

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, service: ServiceDep, tenant: TenantDep) -> dict[str, Any]:
    service.check_accepting()
    if body.model is not None:
        choose_adapter(service, tenant, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give exactly one of prompt and messages", param="prompt")
    if body.messages is not None:
        ids = await encode_chat(service, [message.plain() for message in body.messages], body.add_generation_prompt)
    else:
        assert body.prompt is not None
        ids = (await encode_prompts(service, [body.prompt], body.add_special_tokens))[0]
    tokenizer = tokenizer_of(service)
    strings = [tokenizer.decode([token], skip_special=False) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids, "token_strs": strings}


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, service: ServiceDep, tenant: TenantDep) -> dict[str, Any]:
    service.check_accepting()
    if body.model is not None:
        choose_adapter(service, tenant, body.model)
    try:
        return {"prompt": await asyncio.to_thread(tokenizer_of(service).decode, body.tokens)}
    except RequestError as error:
        raise bad_request(error, "tokens") from None

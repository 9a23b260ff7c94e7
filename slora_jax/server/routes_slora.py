"""S-LoRA's own calls, for its clients."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from slora_jax.requests import Delta, TokenLogprob
from slora_jax.server.answering import Answers, choose_adapter, encode_prompts
from slora_jax.server.depends import ServiceDep, TenantDep, log_field
from slora_jax.server.events import EventStream, answer_unless_gone, to_json
from slora_jax.server.logprobs import TokenTexts
from slora_jax.server.sampling import slora_params
from slora_jax.server.schemas import SloraBody

router = APIRouter()


@router.post("/generate")
async def generate(body: SloraBody, request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    answers, prompts, texts = await _prepare(body, request, service, tenant)
    params = slora_params(body.parameters)

    async def whole() -> dict[str, Any]:
        async with answers:
            await answers.start(prompts, params)
            done = (await answers.collect())[0].completions[0]
            answer = {"generated_text": [done.text], "count_output_tokens": len(done.token_ids)}
            if body.parameters.return_details:
                answer["tokens"] = [_token(entry, texts(entry.token_id)) for entry in done.logprobs or ()]
            return answer

    return await answer_unless_gone(request, whole())


@router.post("/generate_stream")
async def generate_stream(body: SloraBody, request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    answers, prompts, _ = await _prepare(body, request, service, tenant)
    await answers.start(prompts, slora_params(body.parameters), streamed=True)

    def written(delta: Delta) -> bytes:
        token = _token(delta.logprobs[-1], delta.text) if delta.logprobs else None
        finished = delta.finish_reason is not None
        data = {"token": token, "generated_text": None, "finished": finished, "details": None}
        return b"data:" + to_json(data) + b"\n\n"

    async def pieces() -> AsyncGenerator[bytes]:
        async for batch in answers.pieces():
            yield b"".join(written(delta) for _, delta in batch)

    return EventStream(pieces(), service.config.write_seconds, answers.close)


async def _prepare(
    body: SloraBody, request: Request, service: ServiceDep, tenant: TenantDep
) -> tuple[Answers, list[list[int]], TokenTexts]:
    service.check_accepting()
    name = body.lora_dir or service.config.model_name
    adapter = choose_adapter(service, tenant, name)
    log_field(request, model=name)
    prompts = await encode_prompts(service, [body.inputs])
    answers = Answers(service, tenant, adapter, request, "gen")
    return answers, prompts, TokenTexts(service.engine.model.tokenizer, False)


def _token(entry: TokenLogprob, text: str) -> dict[str, Any]:
    return {"id": entry.token_id, "text": text, "logprob": max(entry.logprob, -9999.0), "special": False}

"""OpenAI's calls: chat, completions, models."""

import asyncio
from collections.abc import AsyncGenerator
import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from slora_jax.server.answering import Answers, choose_adapter, encode_chat, encode_prompts, tokenizer_of
from slora_jax.server.depends import ServiceDep, TenantDep, log_field
from slora_jax.server.events import DONE, EventStream, answer_unless_gone
from slora_jax.server.logprobs import TokenTexts
from slora_jax.server.openai_format import ChatFormat, CompletionFormat
from slora_jax.server.sampling import chat_params, completion_params, room_for
from slora_jax.server.schemas import ChatBody, CompletionBody
from slora_jax.server.structured import structured_output
from slora_jax.server.tool_choice import choose_tools

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    service.check_accepting()
    adapter = choose_adapter(service, tenant, body.model)
    log_field(request, model=body.model)
    form, form_param = structured_output(body)
    tools = choose_tools(body, tokenizer_of(service).chat_template)
    ids = await encode_chat(service, [m.plain() for m in body.messages], tools=tools.described if tools else None)
    room = room_for(service.engine, [ids], adapter, service.config.max_answer_tokens)
    params = dataclasses.replace(chat_params(body, room), structured=form)
    if tools is not None:
        skip_special = params.skip_special_tokens and tools.skip_special
        params = dataclasses.replace(params, structured=tools.structured or form, skip_special_tokens=skip_special)
        form_param = "tools" if tools.structured else form_param
    answers = Answers(service, tenant, adapter, request, "chatcmpl")
    texts = TokenTexts(service.engine.model.tokenizer, body.return_tokens_as_token_ids)
    usage_follows = bool(body.stream_options and body.stream_options.include_usage)
    written = ChatFormat(answers.id, body.model, texts, body.return_token_ids, usage_follows, tools)

    async def whole() -> dict[str, Any]:
        async with answers:
            await answers.start([ids], params, form_param)
            return written.whole((await answers.collect())[0])

    async def pieces() -> AsyncGenerator[bytes]:
        async for batch in answers.pieces():
            yield b"".join(written.events(batch, answers.outputs))
        if usage_follows:
            yield written.usage_event(answers.outputs)
        yield DONE

    if not body.stream:
        return await answer_unless_gone(request, whole())
    await answers.start([ids], params, form_param, streamed=True)
    return EventStream(
        pieces(),
        service.config.write_seconds,
        answers.close,
        begun=lambda writer: answers.write_through(writer, written.plain),
    )


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    service.check_accepting()
    adapter = choose_adapter(service, tenant, body.model)
    log_field(request, model=body.model)
    params, score_only = completion_params(body)
    form, form_param = structured_output(body)
    params = dataclasses.replace(params, structured=form)
    prompts = await encode_prompts(service, body.prompts(), body.add_special_tokens)
    tokenizer = service.engine.model.tokenizer
    echoed = None
    if body.echo:
        given = zip(body.prompts(), prompts, strict=True)
        echoed = [p if isinstance(p, str) else tokenizer.decode(ids) if tokenizer else "" for p, ids in given]
    answers = Answers(service, tenant, adapter, request, "cmpl")
    texts = TokenTexts(tokenizer, body.return_tokens_as_token_ids)
    usage_follows = bool(body.stream_options and body.stream_options.include_usage)
    written = CompletionFormat(
        answers.id, body.model, texts, body.return_token_ids, usage_follows, params.n, echoed, score_only
    )

    async def whole() -> dict[str, Any]:
        async with answers:
            await answers.start(prompts, params, form_param)
            return written.whole(await answers.collect())

    async def pieces() -> AsyncGenerator[bytes]:
        async for batch in answers.pieces():
            yield b"".join(written.events(batch, answers.outputs))
        if usage_follows:
            yield written.usage_event(answers.outputs, score_only)
        yield DONE

    if not body.stream:
        return await answer_unless_gone(request, whole())
    await answers.start(prompts, params, form_param, streamed=True)
    return EventStream(
        pieces(),
        service.config.write_seconds,
        answers.close,
        begun=lambda writer: answers.write_through(writer, written.plain),
    )


@router.get("/v1/models")
async def models(service: ServiceDep, tenant: TenantDep) -> dict[str, Any]:
    """The base model and the adapters that the caller may use."""
    manager, base = service.adapters, service.config.model_name

    def listed() -> list[dict[str, Any]]:
        names = [name for name in manager.names() if tenant.key.may_use(name)]
        entries = [_model(service, name, manager.path(name), base) for name in names]
        return [_model(service, base, base, None), *entries] if tenant.key.base else entries

    return {"object": "list", "data": await asyncio.to_thread(listed)}


@router.get("/v1/models/{name:path}")
async def model(name: str, service: ServiceDep, tenant: TenantDep) -> dict[str, Any]:
    base = service.config.model_name
    adapter = choose_adapter(service, tenant, name)
    root = base if adapter is None else service.adapters.path(adapter)
    return _model(service, name, root, None if adapter is None else base)


def _model(service: ServiceDep, name: str, root: str, parent: str | None) -> dict[str, Any]:
    """root: where an adapter lies under the server's directory; vLLM's field, by which routers know it."""
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "slora-jax",
        "root": root,
        "parent": parent,
        "max_model_len": service.engine.max_model_len,
    }

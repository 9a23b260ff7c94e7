"""One call being answered: prompts to token ids, to the engine, and accounted for at the end, however it comes."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
import contextlib
from typing import Any, Self

from starlette.requests import Request as HttpRequest

from slora_jax.async_deltas import AsyncDeltas, Pieces
from slora_jax.errors import AdapterError, CapacityError, RequestError
from slora_jax.requests import Delta, Request, RequestOutput
from slora_jax.sampling_params import SamplingParams
from slora_jax.server.errors import ApiError, unknown_model
from slora_jax.server.merging import merged
from slora_jax.server.protocol import BodyWriter
from slora_jax.server.sampling import bad_request
from slora_jax.server.service import Service
from slora_jax.server.tenants import Tenant
from slora_jax.structured import StructuredOutputError
from slora_jax.tokenizer import Tokenizer


def choose_adapter(service: Service, tenant: Tenant, model: str) -> str | None:
    """The adapter that a call's `model` names, None for the base model. ApiError 404 if the caller may not use it."""
    adapter = None if model == service.config.model_name else model
    if not tenant.key.may_use(adapter) or (adapter is not None and not service.adapters.serves(adapter)):
        raise unknown_model(model)
    return adapter


def tokenizer_of(service: Service, param: str = "prompt") -> Tokenizer:
    """ApiError 400 for a model without one."""
    tokenizer = service.engine.model.tokenizer
    if tokenizer is None:
        raise ApiError(400, f"this model has no tokenizer; send the {param} as token ids", param=param)
    return tokenizer


async def encode_prompts(
    service: Service, prompts: Sequence[str | Sequence[int]], add_special_tokens: bool = True, param: str = "prompt"
) -> list[list[int]]:
    """Token ids of prompts. Ids are taken as they are; the engine checks them. param: the call's field they are of."""

    def encode(prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        most = service.engine.max_model_len
        return tokenizer_of(service, param).encode(prompt, add_special_tokens=add_special_tokens, max_tokens=most)

    try:
        if not any(isinstance(prompt, str) for prompt in prompts):
            return [encode(prompt) for prompt in prompts]  # a copy needs no thread
        return await asyncio.to_thread(lambda: [encode(prompt) for prompt in prompts])
    except RequestError as error:
        raise bad_request(error, param) from None


async def encode_chat(
    service: Service,
    messages: Sequence[dict[str, Any]],
    generation_prompt: bool = True,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a chat, through the model's template."""
    tokenizer = tokenizer_of(service)
    try:
        return await asyncio.to_thread(
            tokenizer.chat, list(messages), generation_prompt, tools, service.engine.max_model_len
        )
    except RequestError as error:
        raise bad_request(error, "messages") from None


class Answers:
    """The answers to a call's prompts. Use it with ``async with``; leaving early aborts what is not finished."""

    def __init__(self, service: Service, tenant: Tenant, adapter: str | None, request: HttpRequest, kind: str):
        self._service = service
        self._tenant = tenant
        self._adapter = adapter
        self.id = f"{kind}-{request.state.request_id}"
        self._log: dict[str, Any] = request.state.log
        self._deltas: AsyncDeltas | None = None
        self.outputs: Sequence[RequestOutput] = ()  # one for each prompt; complete when the iteration has ended
        self._places = contextlib.ExitStack()

    async def start(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        form: str = "response_format",
        *,
        streamed: bool = False,
    ) -> Self:
        """Queues the prompts. ApiError 400, 404, 429 or 503 if they cannot be answered; nothing is queued then.

        form: the call's field that asks for params.structured. streamed: `pieces` are wanted, not only `collect`.
        """
        config = self._service.config
        if len(prompts) > config.max_prompts:
            raise ApiError(400, f"a call may have {config.max_prompts} prompts, not {len(prompts)}", param="prompt")
        completions = len(prompts) * params.n
        if completions > config.max_completions:
            raise ApiError(
                400, f"a call may ask for {config.max_completions} completions, not {completions}", param="n"
            )
        if params.max_tokens > config.max_answer_tokens:
            raise ApiError(
                400,
                f"max_tokens must be at most {config.max_answer_tokens} on this server, not {params.max_tokens}",
                param="max_tokens",
            )
        vocab = self._service.engine.model.config.vocab_size
        if any(token >= vocab for token in params.logit_bias):
            raise ApiError(400, f"logit_bias names a token id outside the vocabulary of {vocab}", param="logit_bias")
        self._places.enter_context(self._service.admit(self._tenant, completions))
        requests = [
            Request(None, self._adapter, params, ids, request_id=f"{self.id}-{i}", tenant=self._tenant.key.name)
            for i, ids in enumerate(prompts)
        ]
        try:
            self._deltas = await self._service.engine.astart(requests, ends_only=not streamed)
        except BaseException as error:
            self._places.close()
            if isinstance(error, AdapterError):  # unloaded since it was looked up
                raise unknown_model(self._adapter or "") from None
            if isinstance(error, StructuredOutputError):
                raise ApiError(400, str(error), param=form) from None
            if isinstance(error, RequestError | CapacityError):
                raise bad_request(error, "prompt") from None
            raise
        self.outputs = self._deltas.outputs
        if self._adapter is not None:
            self._service.adapters.touch(self._adapter)
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Aborts what is not finished, gives the place back and counts what was done. Harmless when called again."""
        deltas, self._deltas = self._deltas, None
        if deltas is None:
            return
        deltas.close()
        self._places.close()
        for output in self.outputs:
            self._service.finished(output, self._tenant)
        timings = [output.timings for output in self.outputs]
        self._log |= dict(
            prompt_tokens=sum(len(output.prompt_token_ids) for output in self.outputs),
            answer_tokens=sum(len(c.token_ids) for output in self.outputs for c in output.completions),
            queue_seconds=max((round(t.scheduled - t.arrival, 4) for t in timings if t.scheduled), default=None),
            ttft_seconds=max((round(t.ttft, 4) for t in timings if t.ttft), default=None),
        )

    def write_through(self, writer: BodyWriter, event: Callable[[int, Delta], bytes | None]) -> None:
        """Has pieces that come while `pieces` waits written at once. event: of a piece, None if `pieces` shall have
        it; asking must change nothing.
        """

        def write(batch: Pieces) -> bool:
            if not writer.ready():
                return False
            try:
                events = [event(index, delta) for index, delta in merged(batch)]
                if None in events:
                    return False
                writer.write(b"".join(filter(None, events)))
            except Exception:  # the task that waits for these pieces meets it again, and tells the client
                return False
            return True

        if self._deltas is not None:
            self._deltas.divert(write)

    async def pieces(self) -> AsyncGenerator[list[tuple[int, Delta]]]:
        """(index of the prompt, Delta), as many at a time as have come. ApiError if an answer failed."""
        deltas = self._deltas
        while deltas is not None and (batch := await deltas.take()):
            if deltas.ended:  # who reads the end may ask again at once, and finds the place free
                self.close()
            bad = next((i for i, (_, delta) in enumerate(batch) if delta.finish_reason in ("error", "abort")), None)
            if bad != 0:
                yield batch[:bad]
            if bad is not None:
                index, failed = batch[bad]
                completion = self.outputs[index].completions[failed.index]
                if completion.finish_reason == "error":
                    error = self._service.adapters.without_paths(completion.error)
                    raise ApiError(500, error or "the answer failed", code="generation_failed")
                raise ApiError(503, "the answer was cut short by the server", code="aborted", retry_after=1)

    async def collect(self) -> Sequence[RequestOutput]:
        """Waits for the ends of all answers."""
        async for _ in self.pieces():
            pass
        return self.outputs

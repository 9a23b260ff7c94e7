"""Checks requests and makes jobs of them, on the callers' threads. Nothing is queued here."""

from collections.abc import Callable
import itertools
import secrets
import time

from slora_jax.errors import CapacityError, RequestError
from slora_jax.grammar import Grammars
from slora_jax.jobs import Generation, Job, Sink
from slora_jax.loading import LoadedModel
from slora_jax.registry import AdapterRecord
from slora_jax.requests import Completion, EmbeddingRequest, Request, RequestOutput, Timings
from slora_jax.sampling_params import SamplingParams
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import AdapterUse, Sequence
from slora_jax.text_stream import TextStream


class Admission:
    """Turns requests into jobs.

    find_adapter: the adapter of a name, or AdapterError. adapter_use: what the scheduler needs to know of it.
    """

    def __init__(
        self,
        model: LoadedModel,
        max_model_len: int,
        scheduler: Scheduler,
        find_adapter: Callable[[str], AdapterRecord],
        adapter_use: Callable[[AdapterRecord], AdapterUse],
    ):
        self._model = model
        self._max_model_len = max_model_len
        self._scheduler = scheduler
        self._find_adapter = find_adapter
        self._adapter_use = adapter_use
        self._grammars = Grammars(model.tokenizer, model.eos_token_ids, model.config.vocab_size)
        self._ids = itertools.count()

    def close(self) -> None:
        """Ends what helps to check requests."""
        self._grammars.close()

    def prompt_ids(self, request: Request, answer: int = 1) -> list[int]:
        """Token ids of a request's prompt. Raises RequestError if it is empty, not of the vocabulary, or too long to
        leave room for `answer` tokens.
        """
        given = [x is not None for x in (request.prompt, request.prompt_token_ids, request.messages)]
        if sum(given) != 1:
            raise RequestError("give exactly one of prompt, prompt_token_ids and messages")
        if request.prompt_token_ids is not None:
            ids = [int(t) for t in request.prompt_token_ids]
        else:
            tokenizer = self._model.tokenizer
            if tokenizer is None:
                raise RequestError(f"{self._model.name} has no tokenizer; give prompt_token_ids")
            most = self._max_model_len
            if request.prompt is not None:
                ids = tokenizer.encode(request.prompt, max_tokens=most)
            else:
                ids = tokenizer.chat(request.messages, max_tokens=most)
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        vocab = self._model.config.vocab_size
        bad = next((t for t in (*ids, *request.sampling.logit_bias) if not 0 <= t < vocab), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the model's vocabulary of {vocab}")
        if len(ids) + answer > self._max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the model takes {self._max_model_len}"
                f"{' with the answer' if answer else ''}; shorten it"
            )
        return ids

    def embedding(self, request: EmbeddingRequest | str, sink: Sink) -> Job:
        """job for an embedding. The sampler runs on its row as on any other, and what it chooses is dropped."""
        if isinstance(request, str):
            request = EmbeddingRequest(request)
        plain = Request(
            request.prompt,
            request.adapter,
            SamplingParams(max_tokens=1),
            request.prompt_token_ids,
            request_id=request.request_id,
            priority=request.priority,
            tenant=request.tenant,
        )
        return self.job(plain, sink, embeds=True)

    def job(self, request: Request | str, sink: Sink, *, embeds: bool = False) -> Job:
        """Checks a request and makes its job. Raises RequestError, AdapterError or CapacityError; nothing is queued."""
        if isinstance(request, str):
            request = Request(request)
        params = request.sampling
        adapter = self._find_adapter(request.adapter) if request.adapter is not None else None
        ids = self.prompt_ids(request, 0 if embeds else 1)
        tokenizer = self._model.tokenizer
        if params.stop and tokenizer is None:
            raise RequestError(
                f"{self._model.name} has no tokenizer, so stop strings cannot be found; use stop_token_ids"
            )
        constraints = self._grammars.start(params.structured, params.n) if params.structured else [None] * params.n
        output = RequestOutput(
            request_id=request.request_id or f"req-{next(self._ids)}-{secrets.token_hex(4)}",
            prompt=request.prompt,
            prompt_token_ids=ids,
            adapter=request.adapter,
            adapter_digest=adapter.digest if adapter else None,
            completions=[],
            prompt_logprobs=[None] * len(ids) if params.prompt_logprobs is not None else None,
            timings=Timings(time.monotonic()),
        )
        job = Job(request, adapter, output, sink, embeds)
        use = self._adapter_use(adapter) if adapter is not None else None
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        end_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(self._model.eos_token_ids)
        )
        for index, constraint in enumerate(constraints):
            seq = Sequence(
                seq_id=(output.request_id, index, next(self._ids)),
                tokens=list(ids),
                prompt_len=len(ids),
                max_tokens=1 if embeds else min(params.max_tokens, self._max_model_len - len(ids)),
                adapter=use,
                prompt_logprobs=index == 0 and params.prompt_logprobs is not None,
                adapter_name=request.adapter,
                tenant=request.tenant,
                priority=request.priority,
                arrival=output.timings.arrival,
            )
            self._check_fits(seq)
            completion = Completion(index, logprobs=[] if params.logprobs is not None else None)
            output.completions.append(completion)
            stream = TextStream(tokenizer.stream(params.skip_special_tokens) if tokenizer else None, params.stop)
            job.generations.append(Generation(job, seq, completion, stream, seed + index, end_ids, constraint))
        if adapter is not None:
            adapter.hits += 1
            adapter.last_used = time.time()
        return job

    def _check_fits(self, seq: Sequence) -> None:
        pool = self._scheduler.pool
        if seq.worst_case_pages > pool.num_pages:
            raise CapacityError(
                f"the request may need {seq.worst_case_pages} pages (prompt {seq.prompt_len} tokens, "
                f"answer up to {seq.max_tokens}"
                f"{f', adapter {seq.adapter.num_pages} pages' if seq.adapter else ''}) "
                f"and the pool has {pool.num_pages}; "
                "lower max_tokens or set page_pool_bytes higher"
            )
        try:
            self._scheduler.check(seq)
        except ValueError as error:
            raise CapacityError(f"{error}; lower max_tokens or raise the quota's max_pages") from None

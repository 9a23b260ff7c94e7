"""The Engine's methods for embeddings: prompts that become vectors.

The vector is the final hidden state at the prompt's last token, which alone has seen all others; so a prompt may be
computed in chunks, begin with cached pages, or be preempted, like any other. Models and adapters made for embeddings
(E5-Mistral, GTE-Qwen2, Linq and others) are trained with this pooling; many of them want an end token after the text.
"""

from collections.abc import Callable, Coroutine, Sequence
import queue
from typing import Any

import numpy as np

from slora_jax.admission import Admission
from slora_jax.async_deltas import AsyncDeltas
from slora_jax.engine_loop import EngineLoop
from slora_jax.jobs import Job, Sink
from slora_jax.requests import Delta, EmbeddingOutput, EmbeddingRequest


class EngineEmbeddings:
    """Makes embeddings. A base class of Engine."""

    _admission: Admission
    _loop: EngineLoop
    _start: Callable[[list[Job]], None]
    _astart: Callable[[Callable[[Callable[[int], Sink]], list[Job]], bool], Coroutine[Any, Any, AsyncDeltas]]

    def embed(self, requests: Sequence[EmbeddingRequest | str]) -> list[EmbeddingOutput]:
        """Embeds prompts in the same steps in which others are answered, and returns the vectors in order.

        Every request is checked before any is queued: RequestError, AdapterError or CapacityError names the first bad
        one. A failure later on ends that request alone, and its output has the error.
        """
        finished: queue.SimpleQueue[None] = queue.SimpleQueue()

        def sink(delta: Delta) -> None:
            if delta.output:
                finished.put(None)

        jobs = [self._admission.embedding(r, sink) for r in requests]
        self._loop.call(lambda: self._start(jobs))
        for _ in jobs:
            finished.get()
        return _outputs(jobs, requests)

    async def aembed(self, requests: Sequence[EmbeddingRequest | str]) -> list[EmbeddingOutput]:
        """embed for asyncio. Cancelling the task aborts the requests."""

        def make_jobs(sink: Callable[[int], Sink]) -> list[Job]:
            return [self._admission.embedding(r, sink(i)) for i, r in enumerate(requests)]

        deltas = await self._astart(make_jobs, True)
        try:
            async for _ in deltas:
                pass
            return _outputs(deltas.jobs, requests)
        finally:
            deltas.close()


def _outputs(jobs: Sequence[Job], requests: Sequence[EmbeddingRequest | str]) -> list[EmbeddingOutput]:
    return [_output(job, isinstance(r, str) or r.normalize) for job, r in zip(jobs, requests, strict=True)]


def _output(job: Job, normalize: bool) -> EmbeddingOutput:
    output, (done,) = job.output, job.output.completions
    embedding = job.hidden if done.finish_reason == "stop" else None
    if embedding is not None and normalize:
        # in float64, so that the length is 1 to the last bit of float32; a vector of zeros stays one
        length = np.linalg.norm(embedding.astype(np.float64))
        embedding = (embedding / max(length, np.finfo(np.float32).tiny)).astype(np.float32)
    return EmbeddingOutput(
        request_id=output.request_id,
        prompt_token_ids=output.prompt_token_ids,
        adapter=output.adapter,
        adapter_digest=output.adapter_digest,
        embedding=embedding,
        error=None if embedding is not None else done.error or "the request was aborted",
        timings=output.timings,
    )

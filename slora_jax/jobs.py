"""A request in flight: its sequences, its growing texts, and where the pieces go."""

from collections.abc import Callable
import logging
import time

from slora_jax.adapters import Adapter
from slora_jax.grammar import Constraint
from slora_jax.requests import Completion, Delta, Request, RequestOutput, TokenLogprob
from slora_jax.sampling_batch import RowSampling
from slora_jax.sampling_params import SamplingParams
from slora_jax.sequence import Sequence
from slora_jax.text_stream import TextStream

logger = logging.getLogger(__name__)

Sink = Callable[[Delta], object]  # what it returns is ignored


class Generation:
    """One completion of a job."""

    def __init__(
        self,
        job: "Job",
        seq: Sequence,
        completion: Completion,
        stream: TextStream,
        seed: int,
        end_ids: frozenset[int],
        constraint: Constraint | None = None,
    ):
        self.job = job
        self.seq = seq
        self.completion = completion
        self.stream = stream
        self.seed = seed
        self.end_ids = end_ids  # token ids that end the text
        self.constraint = constraint  # of structured output

    @property
    def finished(self) -> bool:
        return self.completion.finish_reason is not None

    @property
    def needs_host_tokens(self) -> bool:
        """Whether its next token cannot be chosen before the host has seen the last one."""
        return self.constraint is not None

    def row_sampling(self, position: int) -> RowSampling:
        """Sampling for the row of logits that predicts the token after `position`."""
        p = self.job.params
        if position == len(self.seq.tokens) - 1:
            return RowSampling(
                params=p,
                seed=self.seed,
                tokens=self.seq.tokens,
                prompt_len=self.seq.prompt_len,
                top_logprobs=p.logprobs,
                constraint=self.constraint,
            )
        return RowSampling(params=None, target=self.seq.tokens[position + 1], top_logprobs=p.prompt_logprobs)

    def push(self, token: int, logprob: TokenLogprob | None) -> None:
        """Takes a sampled token: text, stopping rules, and a delta to the sink. May finish the completion."""
        now = time.monotonic()
        done = self.completion
        self.seq.tokens.append(token)
        done.token_ids.append(token)
        if done.logprobs is not None and logprob is not None:
            done.logprobs.append(logprob)
        timings = self.job.output.timings
        timings.first_token = timings.first_token or now
        if self.constraint is not None and (error := self.constraint.advance(token)):
            self.finish("error", error=error, new_tokens=(token,))
            return
        if token in self.end_ids:
            stop: str | int | None = self.stream.flush() or token
            self.finish("stop", stop, new_tokens=(token,))
            return
        stop = self.stream.push(token)
        if stop is None and self.constraint is not None and self.constraint.done:
            self.finish("stop", self.stream.flush(), new_tokens=(token,))
            return
        if stop is None and self.seq.output_len >= self.seq.max_tokens:
            stop = self.stream.flush()
            if stop is None:
                self.finish("length", new_tokens=(token,))
                return
        if stop is not None:
            self.finish("stop", stop, new_tokens=(token,))
            return
        self._emit((token,))

    def finish(
        self,
        reason: str,
        stop_reason: str | int | None = None,
        *,
        error: str | None = None,
        new_tokens: tuple[int, ...] = (),
    ) -> None:
        done = self.completion
        done.finish_reason, done.stop_reason, done.error = reason, stop_reason, error
        done.text = self.stream.text
        self._emit(new_tokens)

    def _emit(self, new_tokens: tuple[int, ...]) -> None:
        job, reason = self.job, self.completion.finish_reason
        output = None
        if reason is not None and all(g.finished for g in job.generations):
            job.output.timings.finished = time.monotonic()
            job.output.timings.preemptions = sum(g.seq.preemptions for g in job.generations)
            output = job.output
        text = self.stream.take(final=reason is not None)
        logprobs = self.completion.logprobs
        if logprobs is not None:
            logprobs = logprobs[len(logprobs) - len(new_tokens) :]
        delta = Delta(job.output.request_id, self.completion.index, text, new_tokens, reason, output, logprobs)
        try:
            job.sink(delta)
        except Exception:  # a caller's function: its error must not stop the engine, which serves others too
            logger.exception("what takes the answer of request %s raised", job.output.request_id)


class Job:
    """A request in flight."""

    def __init__(self, request: Request, adapter: Adapter | None, output: RequestOutput, sink: Sink):
        self.request = request
        self.adapter = adapter
        self.output = output
        self.sink = sink
        self.generations: list[Generation] = []

    @property
    def params(self) -> SamplingParams:
        return self.request.sampling

    @property
    def finished(self) -> bool:
        return all(g.finished for g in self.generations)

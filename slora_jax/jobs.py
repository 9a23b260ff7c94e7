"""A request in flight: its sequences, its growing texts, and where the pieces go."""

from collections.abc import Callable, Container
import logging
import time
from typing import Any

import numpy as np

from slora_jax.grammar import Constraint
from slora_jax.registry import AdapterRecord
from slora_jax.requests import Completion, Delta, Request, RequestOutput, TokenLogprob
from slora_jax.sampling_batch import RowSampling, penalised
from slora_jax.sampling_params import SamplingParams
from slora_jax.sequence import Sequence
from slora_jax.text_stream import TextStream

logger = logging.getLogger(__name__)

Sink = Callable[[Delta], object]  # what it returns is ignored


class Generation:
    """One completion of a job. The engine's thread samples its tokens; the delivery thread makes text of them, which
    may end it earlier, at a stop string.
    """

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
        self.max_length = seq.prompt_len + seq.max_tokens  # of the sequence
        # whether a step cannot be built before the values of all tokens so far are on the host; such a request makes
        # the engine wait for each step's results before it plans the next
        self.needs_host_tokens = constraint is not None or penalised(job.params)

    @property
    def finished(self) -> bool:
        """Whether the text is complete. The engine may have ended it before, or notice a little later."""
        return self.completion.finish_reason is not None

    def row_sampling(self, position: int) -> RowSampling:
        """Sampling for the row of logits that predicts the token after `position`. Tokens up to there must be known if
        penalties apply.
        """
        p = self.job.params
        if position + 1 >= self.seq.prompt_len:
            return RowSampling(
                params=p,
                seed=self.seed,
                tokens=self.seq.tokens[: position + 1] if self.needs_host_tokens else (),
                length=position + 1,
                prompt_len=self.seq.prompt_len,
                top_logprobs=p.logprobs,
                constraint=self.constraint,
            )
        return RowSampling(params=None, target=self.seq.tokens[position + 1], top_logprobs=p.prompt_logprobs)

    def advance(self, token: int) -> tuple[str | None, str | None]:
        """Takes a sampled token into the sequence. Returns (reason, error) as in Event. On the engine's thread."""
        seq, constraint = self.seq, self.constraint
        assert seq.num_unknown
        seq.num_unknown -= 1  # push, without the call
        seq.tokens.append(token)
        if constraint is not None and (error := constraint.advance(token)):
            return "error", error
        if token in self.end_ids:
            return "stop", None
        if constraint is not None and constraint.done:
            return "complete", None
        if len(seq.tokens) >= self.max_length:
            return "length", None
        return None, None

    def take(
        self,
        token: int | None,
        logprob: TokenLogprob | None,
        reason: str | None,
        error: str | None,
        stopped: Callable[["Generation"], object],
    ) -> None:
        """A sampled token, or the end of the completion, or both: text, stop strings, and a delta to the sink. On the
        delivery thread; arguments as in Event and Delivery.
        """
        done = self.completion
        if self.finished:  # at a stop string, and the engine did not know yet
            return
        if token is None:
            assert reason is not None
            self.finish(reason, error=error)
            return
        done.token_ids.append(token)
        timings = self.job.output.timings
        timings.first_token = timings.first_token or time.monotonic()
        if done.logprobs is not None and logprob is not None:
            done.logprobs.append(logprob)
        if reason == "error":
            self.finish("error", error=error, new_tokens=(token,))
            return
        if reason == "stop":
            self.finish("stop", self.stream.flush() or token, new_tokens=(token,))
            return
        stop = self.stream.push(token)
        if stop is None and reason is not None:
            stop = self.stream.flush()
            if stop is None:
                self.finish("stop" if reason == "complete" else reason, new_tokens=(token,))
                return
        if stop is None:
            self._emit((token,))
            return
        if reason is None:
            stopped(self)
        self.finish("stop", stop, new_tokens=(token,))

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
        if output is not None:
            job.delivered = True
            job.let_go()


class Job:
    """A request in flight. embeds: the prompt's final hidden state is wanted, and no answer."""

    def __init__(
        self, request: Request, adapter: AdapterRecord | None, output: RequestOutput, sink: Sink, embeds: bool = False
    ):
        self.request = request
        self.adapter = adapter
        self.output = output
        self.sink = sink
        self.embeds = embeds
        self.hidden: np.ndarray | None = None  # float32 [H], of the prompt's last token
        self.generations: list[Generation] = []
        self.open = 0  # completions that the engine computes; its thread's own
        self.delivered = False  # whether the last piece is out; the delivery thread's own

    @property
    def params(self) -> SamplingParams:
        return self.request.sampling

    @property
    def finished(self) -> bool:
        """Whether all of its texts are complete."""
        return all(g.finished for g in self.generations)

    def let_go(self) -> None:
        """Ends the cycle of a job and its completions when both threads are done with it. Without that it would stay,
        and with it an adapter's weights that were replaced, until Python looks for cycles among everything there is.
        """
        if self.delivered and not self.open:
            self.generations.clear()

    def describe(self, running: Container[Sequence]) -> dict[str, Any]:
        """What it is and how far, for people and dashboards. It is running once one of its sequences is."""
        return dict(
            request_id=self.output.request_id,
            adapter=self.request.adapter,
            state="running" if any(g.seq in running for g in self.generations) else "waiting",
            prompt_tokens=len(self.output.prompt_token_ids),
            generated_tokens=sum(g.seq.output_len for g in self.generations),
        )

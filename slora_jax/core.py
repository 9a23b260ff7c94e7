"""The engine's inner loop body: plan a step, load adapters, dispatch it, take the results of the one before. Owned by
one thread.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
import contextlib
import logging
import time

import numpy as np

from slora_jax.adapter_loader import AdapterLoader
from slora_jax.adapter_tiers import AdapterTiers
from slora_jax.batch import Output, Sampling
from slora_jax.batch_builder import Rows
from slora_jax.delivery import Event
from slora_jax.dispatched import DispatchedStep, token_logprob
from slora_jax.jobs import Generation, Job
from slora_jax.page_pool import PagePool
from slora_jax.registry import AdapterRecord, AdapterRegistry
from slora_jax.runner import Runner
from slora_jax.sampling_batch import SamplingTable, build_sampling, with_all_features
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import Sequence as Seq
from slora_jax.step_times import StepTimes

logger = logging.getLogger(__name__)


class EngineCore:
    """Runs jobs to their end.

    registry, loader: names of adapters, and what reads them. page_seconds: to copy a page of an adapter to the device.
    deliver: takes what happened to completions, in order, and returns at once.
    overlap: plan and dispatch a step while the one before it runs. Its tokens are then not known yet: they stay on the
    device, where the next step finds them. A sequence that turns out to have ended was computed a token too far, which
    is dropped.
    """

    def __init__(
        self,
        runner: Runner,
        pool: PagePool,
        scheduler: Scheduler,
        registry: AdapterRegistry,
        loader: AdapterLoader,
        deliver: Callable[[Sequence[Event]], object],
        *,
        page_seconds: float = 0.0,
        overlap: bool = True,
    ):
        self.runner = runner
        self.pool = pool
        self.scheduler = scheduler
        self.overlap = overlap
        self.tiers = AdapterTiers(
            registry,
            loader,
            scheduler,
            runner.send,
            runner.write_adapter,
            lambda job, text: self.end(job, "error", text),
            page_seconds,
        )
        self._deliver = deliver
        self._generations: dict[Seq, Generation] = {}  # those that are computed
        self._embeddings = 0  # jobs among them that want one
        self._sampling = SamplingTable(scheduler.max_seqs, runner.keep)
        self._in_flight: DispatchedStep | None = None
        self._last_done = 0.0  # when the results of the last step came
        self._events: list[Event] = []  # not delivered yet
        self._begun: list[Event] = []  # likewise, first tokens
        self.times = StepTimes()
        self.counters = dict(
            steps=0,
            prompt_tokens=0,
            generated_tokens=0,
            preemptions=0,
            dropped=0,
            finished_requests=0,
        )

    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work()

    def jobs(self) -> list[Job]:
        return list({id(g.job): g.job for g in self._generations.values()}.values())

    def adapters_read(self) -> None:
        """To be called when the loader has something to tell."""
        self.tiers.poll()
        if self.has_work():  # then the next step does the rest
            return
        try:
            self.tiers.write(self.scheduler.schedule().loads)
        except Exception as error:  # as in step
            logger.exception("an adapter could not be copied to its pages")
            self._recover(error)

    def prefetch(self, record: AdapterRecord) -> "Future[None]":
        """See Engine.prefetch_adapter."""
        future = self.tiers.prefetch(record)
        if future.done():
            self.adapters_read()
        return future

    def start(self, job: Job) -> None:
        self.tiers.start(job)
        job.open = len(job.generations)
        self._embeddings += job.embeds
        for generation in job.generations:
            self._generations[generation.seq] = generation
            self.scheduler.add(generation.seq)

    def end(self, job: Job, reason: str, error: str | None = None) -> None:
        """Ends what is left of a job at once and frees its pages."""
        for generation in [g for g in job.generations if g.seq in self._generations]:
            self._close(generation)
            self._events.append((generation, None, None, reason, error))
        self.flush()

    def stopped(self, generation: Generation) -> None:
        """A completion has ended, as its text says."""
        if generation.seq in self._generations:
            self._close(generation)

    def flush(self) -> None:
        """Delivers what has happened so far."""
        events, self._events = self._events, []
        self._deliver(events)

    def drain(self) -> None:
        """Waits for the step in flight, whose results nobody wants any more."""
        step, self._in_flight = self._in_flight, None
        if step is not None:
            with contextlib.suppress(Exception):
                self.runner.fetch(step.output, step.logits)

    def step(self) -> bool:
        """Dispatches a step and takes the results of the one before, or of itself if steps do not overlap. False if
        there was nothing to do.

        An error of the device or of planning ends the requests that were running, with the error as their text, and no
        others; if none ran, all of them.
        """
        pending, self._in_flight = self._in_flight, None
        did = pending is not None
        try:
            if pending is not None and pending.needs_host_tokens:
                step, pending = pending, None
                self._collect(step)
            started = self._start_step()
            self.flush()  # while the device works
            if pending is not None:
                step, pending = pending, None
                self._collect(step)
            if self.overlap:
                self._in_flight = started
            elif started is not None:
                self._collect(started)
            did = did or started is not None
        except Exception as error:  # the loop must outlive whatever the device or a policy raises
            logger.exception("a step failed; its requests end with an error")
            if pending is not None:
                with contextlib.suppress(Exception):
                    self._collect(pending)
            self._recover(error)
            did = True
        if not (self.overlap and self.has_work()):
            self.flush()
        return did

    def _start_step(self) -> DispatchedStep | None:
        """Plans a step and dispatches it. None if there is nothing to compute."""
        self.times.begin()
        plan = self.scheduler.schedule()
        self.times.mark("plan")
        self.counters["preemptions"] += len(plan.preempted)
        now = time.monotonic()
        for drop in plan.dropped:
            generation = self._generations[drop.seq]
            self._forget(generation)
            self._events.append((generation, None, None, "abort", drop.reason))
            self.counters["dropped"] += 1
        compiles = self.runner.compiles
        self.tiers.write(plan.loads)
        self.tiers.look_ahead()
        self.times.mark("adapters")
        if not plan.chunks:
            self.tiers.send(plan.sends)
            return None
        for seq in plan.admitted:
            generation = self._generations[seq]
            timings = generation.job.output.timings
            timings.scheduled = timings.scheduled or now
            self._sampling.set(seq.row, generation.job.params, generation.seed, seq.prompt_len)
        self.counters["prompt_tokens"] += sum(
            [min(c.length, c.seq.prompt_len - c.start) for c in plan.chunks if c.start < c.seq.prompt_len]
        )
        # samplers that know penalties and biases are for the largest batch only
        special = self.scheduler.deterministic or not self._sampling.covers(plan.chunks)
        embeds = self._embeddings > 0 and any(c.samples and self._generations[c.seq].job.embeds for c in plan.chunks)
        batch, rows = self.runner.builder.build(
            plan.chunks, self.pool, self.tiers.shapes, widest=special, decode_only=plan.decode_only, hidden=embeds
        )
        self.times.mark("build")
        batch = self.runner.put(batch)
        self.times.mark("dispatch")
        self.tiers.send(plan.sends)
        self.times.mark("adapters")
        logits, hidden = self.runner.forward(batch)
        self.times.mark("dispatch")
        if embeds:
            assert hidden is not None
            hidden.copy_to_host_async()
        chunks, known = plan.chunks, self._generations
        generations = [known[chunks[i].seq] for i in rows.index.tolist()]
        plain = not special and bool(rows.samples.all())
        output = None
        if generations:
            size = len(batch.logit_rows)
            last = np.full(size, self.scheduler.max_seqs, np.int32)  # past the end: for nobody
            last[: len(rows)][rows.samples] = rows.seq_row[rows.samples]
            if plain:
                sampling = self._sampling.gather(rows.seq_row, rows.position + 1, size)
            else:
                sampling = self._row_sampling(rows, generations, size)
            self.times.mark("build")
            output = self.runner.sample(logits, sampling, last)
            self.times.mark("dispatch")
        needs_tokens = not plain and any(generation.needs_host_tokens for generation in generations)
        hidden = hidden if embeds else None
        return DispatchedStep(plan, rows, generations, output, logits, hidden, now, compiles, needs_tokens)

    def _row_sampling(self, rows: Rows, generations: list[Generation], size: int) -> Sampling:
        """How tokens are chosen in a step with rows that the table of parameters does not cover."""
        wanted = [g.row_sampling(p) for g, p in zip(generations, rows.position.tolist(), strict=True)]
        sizes = (self.runner.builder.max_model_len, self.runner.config.vocab_size)
        return with_all_features(build_sampling(wanted, size), *sizes)

    def _collect(self, step: DispatchedStep) -> None:
        """Waits for a step's results and hands them out."""
        self.times.begin()
        output = self.runner.fetch(step.output, step.logits)
        self.times.mark("wait")
        try:
            self._take(step, output)
        finally:  # first tokens before the next step is planned; what is not waited for goes out while it runs
            begun, self._begun = self._begun, []
            if begun:
                self._deliver(begun)
            self.times.mark("collect")

    def _take(self, step: DispatchedStep, output: Output | None) -> None:
        """Hands out a step's results."""
        now = time.monotonic()
        # a step's time begins when the device is free for it; one in which something was compiled tells nothing
        seconds = now - max(step.began, self._last_done) if self.runner.compiles == step.compiles else 0.0
        self._last_done = now
        self.times.device += seconds
        self.scheduler.complete(step.plan, seconds)
        self.counters["steps"] += 1
        if output is None:
            return
        assert output.finite is not None  # sample always tells
        hidden = None if step.hidden is None else np.asarray(step.hidden)
        alive, events = self._generations, self._events
        with_logprobs = output.logprobs is not None
        generated = 0
        columns = (step.generations, output.tokens.tolist(), output.finite.tolist(), step.rows.samples.tolist())
        for i, (generation, token, finite, samples) in enumerate(zip(*columns, strict=False)):
            seq = generation.seq
            if seq not in alive:
                continue  # it ended meanwhile
            if not samples:
                step.take_prompt_logprob(i, output)
            elif not finite:
                self._close(generation)
                text = "the model's logits are not finite; check the adapter's weights, or use dtype float32"
                events.append((generation, None, None, "error", text))
            elif hidden is not None and generation.job.embeds:
                generation.job.hidden = hidden[i].copy()
                generation.seq.push(token)  # which nobody asked for
                self._close(generation)
                events.append((generation, None, None, "stop", None))
            else:
                reason, error = generation.advance(token)
                logprob = None
                if with_logprobs and generation.completion.logprobs is not None:
                    logprob = token_logprob(output, i, token, generation.job.params.logprobs or 0)
                begins = len(seq.tokens) == seq.prompt_len + 1
                (self._begun if begins else events).append((generation, token, logprob, reason, error))
                generated += 1
                if reason is not None:
                    self._close(generation)
        self.counters["generated_tokens"] += generated

    def _close(self, generation: Generation) -> None:
        """Computes no more of a completion."""
        self.scheduler.remove(generation.seq)
        self._forget(generation)

    def _forget(self, generation: Generation) -> None:
        del self._generations[generation.seq]
        job = generation.job
        job.open -= 1
        if job.open:
            return
        self._embeddings -= job.embeds
        self.counters["finished_requests"] += 1
        self.tiers.finish(job)
        job.let_go()

    def _recover(self, error: Exception) -> None:
        """The pool was donated to a step that failed: its contents are lost. What ran ends, what waits goes on."""
        lines = str(error).strip().splitlines()
        text = f"the step failed: {lines[0] if lines else type(error).__name__}"
        waiting = set(self.scheduler.waiting)
        lost = {id(g.job): g.job for g in self._generations.values() if g.seq not in waiting}
        self.scheduler.reset()
        for job in lost.values() or self.jobs():
            self.end(job, "error", text)
        for seq in self._generations:
            seq.num_unknown = 0  # a preempted one's last token is lost, and will be sampled again
        self.runner.reset()

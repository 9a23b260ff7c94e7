"""The engine's inner loop body: plan a step, load adapters, run it, hand out tokens. Owned by one thread."""

from collections.abc import Callable
import logging
import time
from typing import Any

from slora_jax.jobs import Generation, Job
from slora_jax.page_pool import PagePool
from slora_jax.policies import Drop
from slora_jax.requests import TokenLogprob
from slora_jax.runner import Runner
from slora_jax.sampling_batch import build_sampling
from slora_jax.scheduler import Chunk, Scheduler, StepPlan, adapter_owner

logger = logging.getLogger(__name__)


class EngineCore:
    """Runs jobs to their end.

    keeps_adapter: whether contents of a digest are still registered under some name; if not, their pages are freed as
    soon as no job uses them.
    """

    def __init__(self, runner: Runner, pool: PagePool, scheduler: Scheduler, keeps_adapter: Callable[[str], bool]):
        self.runner = runner
        self.pool = pool
        self.scheduler = scheduler
        self._keeps_adapter = keeps_adapter
        self._generations: dict[Any, Generation] = {}  # by sequence id
        self.counters = dict(
            steps=0,
            prompt_tokens=0,
            generated_tokens=0,
            preemptions=0,
            dropped=0,
            adapter_loads=0,
            finished_requests=0,
        )

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def jobs(self) -> list[Job]:
        return list({id(g.job): g.job for g in self._generations.values()}.values())

    def describe_jobs(self) -> list[dict[str, Any]]:
        """What is in flight, for people and dashboards. A job is running once one of its sequences is."""
        running = {seq.seq_id for seq in self.scheduler.running}
        return [
            dict(
                request_id=job.output.request_id,
                adapter=job.request.adapter,
                state="running" if any(g.seq.seq_id in running for g in job.generations) else "waiting",
                prompt_tokens=len(job.output.prompt_token_ids),
                generated_tokens=sum(len(g.completion.token_ids) for g in job.generations),
            )
            for job in self.jobs()
        ]

    def start(self, job: Job) -> None:
        for generation in job.generations:
            self._generations[generation.seq.seq_id] = generation
            self.scheduler.add(generation.seq)

    def end(self, job: Job, reason: str, error: str | None = None) -> None:
        """Ends what is left of a job at once and frees its pages."""
        for generation in [g for g in job.generations if not g.finished]:
            self._drop(generation)
            generation.finish(reason, error=error)
        self._after(job)

    def step(self) -> bool:
        """One step. False if there was nothing to compute.

        An error of the device ends the requests that were running, with the error as their text, and no others.
        """
        plan = self.scheduler.schedule()
        self.counters["preemptions"] += len(plan.preempted)
        for drop in plan.dropped:
            self._give_up(drop)
        if not plan.chunks:
            return False
        began = time.monotonic()
        try:
            results = self._run(plan)
        except Exception as error:  # the loop must outlive whatever the device raises
            logger.exception("a step failed; its requests end with an error")
            self._recover(error)
            return True
        self.scheduler.complete(plan, time.monotonic() - began)
        self.counters["steps"] += 1
        for chunk, position, token, logprob, finite in results:
            generation = self._generations[chunk.seq.seq_id]
            if position < len(chunk.seq.tokens) - 1:
                self._prompt_logprob(generation, position, logprob)
            elif not finite:
                self._drop(generation)
                text = "the model's logits are not finite; check the adapter's weights, or use dtype float32"
                generation.finish("error", error=text)
            else:
                generation.push(token, logprob)
                self.counters["generated_tokens"] += 1
                if generation.finished:
                    self._drop(generation)
            if generation.job.finished:
                self._after(generation.job)
        return True

    def _give_up(self, drop: Drop) -> None:
        """Ends a completion that the policy dropped from the queue."""
        generation = self._generations.pop(drop.seq.seq_id)
        generation.finish("abort", error=drop.reason)
        self.counters["dropped"] += 1
        if generation.job.finished:
            self._after(generation.job)

    def release_adapter(self, digest: str) -> None:
        """Frees the pages of contents that are neither registered nor used any more."""
        if not self._keeps_adapter(digest) and not any(j.adapter and j.adapter.digest == digest for j in self.jobs()):
            self.scheduler.forget_adapter(digest)

    def _run(self, plan: StepPlan) -> list[tuple[Chunk, int, int, TokenLogprob | None, bool]]:
        now = time.monotonic()
        adapters = {}
        for chunk in plan.chunks:
            job = self._generations[chunk.seq.seq_id].job
            job.output.timings.scheduled = job.output.timings.scheduled or now
            if job.adapter is not None:
                adapters[job.adapter.digest] = job.adapter
            prompt_left = chunk.seq.prompt_len - chunk.start
            self.counters["prompt_tokens"] += max(0, min(chunk.length, prompt_left))
        for use in plan.loads:
            self.runner.load_adapter(adapters[use.digest], self.pool.pages(adapter_owner(use.digest)))
            self.counters["adapter_loads"] += 1
        batch, rows = self.runner.builder.build(plan.chunks, self.pool, adapters)
        logits = self.runner.forward(batch)
        if not rows:
            return []
        wanted = [self._generations[r.chunk.seq.seq_id].row_sampling(r.position) for r in rows]
        output = self.runner.sample(logits, build_sampling(wanted, len(batch.logit_rows)))
        assert output.finite is not None  # sample always tells
        results = []
        for i, (row, sampling) in enumerate(zip(rows, wanted, strict=True)):
            token = int(output.tokens[i])
            logprob = None
            if sampling.top_logprobs is not None:
                assert output.logprobs is not None
                top: dict[int, float] = {}
                if n := sampling.top_logprobs:
                    assert output.top_ids is not None and output.top_logprobs is not None
                    top = dict(zip(output.top_ids[i, :n].tolist(), output.top_logprobs[i, :n].tolist(), strict=True))
                shown = sampling.target if sampling.params is None else token
                logprob = TokenLogprob(shown, float(output.logprobs[i]), top)
            results.append((row.chunk, row.position, token, logprob, bool(output.finite[i])))
        return results

    def _prompt_logprob(self, generation: Generation, position: int, logprob: TokenLogprob | None) -> None:
        table = generation.job.output.prompt_logprobs
        if generation.completion.index == 0 and table is not None:
            table[position + 1] = logprob

    def _drop(self, generation: Generation) -> None:
        del self._generations[generation.seq.seq_id]
        self.scheduler.remove(generation.seq)

    def _after(self, job: Job) -> None:
        self.counters["finished_requests"] += 1
        if job.adapter is not None:
            self.release_adapter(job.adapter.digest)

    def _recover(self, error: Exception) -> None:
        """The pool was donated to a step that failed: its contents are lost. What ran ends, what waits goes on."""
        lines = str(error).strip().splitlines()
        text = f"the step failed: {lines[0] if lines else type(error).__name__}"
        lost = {id(g.job): g.job for g in (self._generations[s.seq_id] for s in self.scheduler.running)}
        for job in lost.values():
            self.end(job, "error", text)
        self.scheduler.reset()
        self.runner.reset()

    def page_map(self) -> list[str | None]:
        """What each page id holds: an adapter's digest, "kv", or None if it is free."""
        kinds: list[str | None] = [None] * self.pool.num_pages
        for owner in self.pool.owners():
            assert isinstance(owner, tuple)  # made by sequence_owner, prefix_owner or adapter_owner
            kind, name = owner
            for page in self.pool.pages(owner):
                kinds[page] = name if kind == "adapter" else "kv"
        return kinds

    def prefix_stats(self) -> dict[str, float]:
        """Prompt tokens of started requests, how many of them were found in the prefix cache, and their share; and how
        many tokens preempted requests found there when they were resumed.
        """
        cache = self.scheduler.prefixes
        if cache is None:
            return dict(prompt_tokens=0, hit_tokens=0, hit_rate=0.0, resumed_tokens=0)
        return dict(
            prompt_tokens=cache.prompt_tokens,
            hit_tokens=cache.hit_tokens,
            hit_rate=cache.hit_tokens / max(cache.prompt_tokens, 1),
            resumed_tokens=cache.resumed_tokens,
        )

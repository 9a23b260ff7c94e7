"""Plays a trace to an engine in real time, from outside, as its callers would."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
import contextlib
import dataclasses
import itertools
import time
from typing import Any

from benchmarks.serving.probe import Compiles, Probe, abort_everything
from benchmarks.serving.ticker import every
from slora_jax import Delta, Engine, Request, RequestOutput, SamplingParams, SloraError
from slora_jax.progress import progress_bar
from slora_jax.traces import TraceRequest
from slora_jax.twin import Record, StepLog

_LEAD = 0.05  # seconds between the start of the clock and the first arrival, in which threads start


@dataclasses.dataclass(frozen=True)
class Run:
    """What was measured.

    outputs, records: one for each request of the trace. asked: when the engine was, by time.monotonic. pages:
    used_pages() over time. page_map: (seconds, one character a group of pages) over time. running: sequences, at the
    same moments. loaded_for: ids of requests that started in the step that loaded their adapter. counters: what the
    engine's counters grew by.
    """

    outputs: list[RequestOutput]
    asked: list[float]
    records: list[Record]
    steps: StepLog
    pages: list[dict[str, float]]
    page_map: list[tuple[float, str]]
    running: list[int]
    loaded_for: set[str]
    counters: dict[str, float]
    compiles: int


def replay(
    engine: Engine,
    trace: Sequence[TraceRequest],
    prompts: Sequence[Sequence[int]],
    *,
    name: Callable[[int], str],
    adapter_bytes: Mapping[str, int],
    title: str = "measuring",
    progress: bool = False,
    sample_seconds: float = 1.0,
    until: float | None = None,
    during: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Run:
    """Sends every request at its moment, whatever became of those before it, and waits for all answers.

    prompts: token ids. name: of an adapter by its index. adapter_bytes: of weights, by digest. until: when whatever has
    not ended is aborted, in seconds of the trace, of which no request may come later. during: something that goes on
    meanwhile. Latencies count from the moment the trace names, so that a late sender is not forgiven.
    Raises SloraError if a request ends in an error, or if anything was compiled meanwhile.
    """
    requests = [_request(r, prompt, name) for r, prompt in zip(trace, prompts, strict=True)]
    groups = [list(group) for _, group in itertools.groupby(range(len(trace)), lambda i: trace[i].arrival)]
    before = engine.stats()
    done = itertools.count(1)
    finished = 0

    def count(delta: Delta) -> None:
        nonlocal finished
        if delta.output:
            finished = next(done)

    start = time.monotonic() + _LEAD
    with (
        Compiles() as compiles,
        Probe(engine, adapter_bytes, start, sample_seconds) as probe,
        ThreadPoolExecutor(len(groups), "request") as pool,
        progress_bar(title, progress) as report,
        contextlib.ExitStack() as stack,
    ):

        def show() -> None:
            report(finished, len(trace), "requests")

        stack.callback(show)
        stack.enter_context(every(0.5, show, "progress"))
        stack.enter_context(during())
        asked = [0.0] * len(trace)

        def ask(group: list[int]) -> list[RequestOutput]:
            for i in group:
                asked[i] = time.monotonic()
            return engine.generate([requests[i] for i in group], on_delta=count)

        waiting = []
        for group in groups:
            time.sleep(max(0.0, start + trace[group[0]].arrival - time.monotonic()))
            waiting.append(pool.submit(ask, group))
        if until is not None:
            time.sleep(max(0.0, start + until - time.monotonic()))
            while not all(future.done() for future in waiting):  # the last ones may not be queued yet
                abort_everything(engine)
                wait(waiting, timeout=0.1)
        outputs = [output for future in waiting for output in future.result()]
    after = engine.stats()
    engine.check_integrity()
    bad = [(r, o) for r, o in zip(trace, outputs, strict=True) if o.finish_reason == "error"]
    if bad:
        first, output = bad[0]
        raise SloraError(
            f"{len(bad)} of {len(trace)} requests of the trace failed, the first ({first.prompt_len} prompt tokens, "
            f"adapter {first.adapter}) after {len(output.token_ids)} tokens: {output.completions[0].error}"
        )
    # the engine's own count, where it keeps one, also knows of programs that were found on disk
    compiled = max(compiles.count, after.get("compiles", 0) - before.get("compiles", 0))
    if compiled:
        raise SloraError(
            f"{compiled} programs were compiled during the measurement ({compiles.seconds:.1f} s), so it is none; "
            "this is a mistake in the warm-up: please report the command"
        )
    return Run(
        outputs=outputs,
        asked=asked,
        records=[_record(r, o, start) for r, o in zip(trace, outputs, strict=True)],
        steps=probe.steps,
        pages=probe.pages,
        page_map=probe.page_map,
        running=probe.running,
        loaded_for=probe.loaded_for,
        counters=_growth(before, after),
        compiles=compiled,
    )


def _request(request: TraceRequest, prompt: Sequence[int], name: Callable[[int], str]) -> Request:
    return Request(
        prompt_token_ids=prompt,
        adapter=None if request.adapter is None else name(request.adapter),
        sampling=SamplingParams(max_tokens=request.output_len, ignore_eos=True),
        tenant=request.tenant,
        priority=request.priority,
    )


def _record(request: TraceRequest, output: RequestOutput, start: float) -> Record:
    timings = output.timings
    if output.finish_reason == "abort":  # given up, or cut off by `until`
        first = _since(start, timings.first_token)
        return Record(request, _since(start, timings.scheduled), first, aborted=first is None)
    if len(output.token_ids) != request.output_len:
        raise SloraError(f"an answer has {len(output.token_ids)} tokens instead of {request.output_len}")
    return Record(
        request,
        scheduled=_since(start, timings.scheduled),
        first_token=_since(start, timings.first_token),
        finished=_since(start, timings.finished),
        preemptions=timings.preemptions,
    )


def _since(start: float, moment: float | None) -> float | None:
    return None if moment is None else moment - start


def _growth(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Of the engine's counters, and of the prefix cache's."""
    names = ("steps", "adapter_loads", "prompt_tokens", "generated_tokens", "preemptions")
    grown = {name: after[name] - before[name] for name in names}
    grown["loads"] = grown.pop("adapter_loads")
    asked, hit = (after["prefix_cache"][k] - before["prefix_cache"][k] for k in ("prompt_tokens", "hit_tokens"))
    return grown | dict(prefix_hit_tokens=hit, prefix_hit_rate=hit / asked if asked else 0.0)

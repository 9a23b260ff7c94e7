"""An engine whose device only takes its time: what is left is the host's work, all of it real.

    python -m benchmarks.server_load.simulated STEP_MS serve MODEL ...

runs `slora-jax serve MODEL ...` with such an engine. Scheduler, arrays, adapters' host memory, the dispatching of
programs with all their arguments, delivery and the server are as ever. The programs are empty, tokens are drawn at
random, nothing is copied to the device, and random:SHAPE has no weights; a thread that waits for a step sleeps until it
would have ended, which lets go of Python as waiting for a device does.
"""

from collections import deque
import dataclasses
import gc
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.empty_programs import EmptyPrograms
from slora_jax import engine
from slora_jax.batch import Batch, Output, Sampling
from slora_jax.buckets import Buckets
from slora_jax.cli import main
from slora_jax.loading import LoadedModel, load_config, load_model
from slora_jax.runner import Runner

_PAGES = 13_000  # of Llama-2-7B beside its weights on an H200
# Shares of the time of a step of as many tokens as sequences: what none takes, and what as many more take. With 256
# sequences on an H200 steps of 32, 256 and 2,048 tokens took 7, 23 and 66 ms (docs/performance.md).
_FIXED, _MORE = 0.25, 0.28


def install(step_ms: float) -> None:
    """Gives engines that are made from now on a simulated device. step_ms: a step of as many tokens as sequences."""

    def make(model, settings, max_model_len, options, *, adapters: bool) -> "SimulatedRunner":
        # of a GPU's sizes wherever this runs, because the host's work goes by padded sizes too
        default = Buckets.default(settings.max_seqs, settings.max_step_tokens, gpu=True)
        runner = SimulatedRunner(
            step_ms / 1e3,
            options=options,
            params=model.params,
            num_pages=_PAGES,
            buckets=Buckets(seqs=settings.seq_buckets or default.seqs, tokens=settings.token_buckets or default.tokens),
            max_model_len=max_model_len,
            chunk_bytes=settings.adapter_chunk_bytes,
        )
        runner.warm_up(adapters=adapters)
        return runner

    engine.make_runner = make  # type: ignore[assignment]
    engine.load_model = _load  # type: ignore[assignment]


def _load(source: str, **options: Any) -> LoadedModel:
    if not source.startswith("random:"):
        return load_model(source, **options)
    return LoadedModel(config=load_config(source), params={}, tokenizer=None, eos_token_ids=(), name=source)


class SimulatedRunner(Runner):
    """A Runner without a pool. Steps run one after another, each for its time from when it can begin."""

    def __init__(self, step_seconds: float, **options: Any):
        super().__init__(**options)
        self._step_seconds = step_seconds
        self._free = 0.0  # when the device has done all that was dispatched
        self._ends: deque[float] = deque()  # of steps that were not fetched
        self._empty = EmptyPrograms(self.builder.buckets.max_seqs)
        self._random = np.random.default_rng(0)

    def reset(self) -> None:
        self._ends.clear()

    def send(self, image, start: int, stop: int) -> list:
        return []

    def write_adapter(self, chunks, page_ids) -> None:
        pass

    def put(self, batch: Batch) -> Batch:
        return batch

    def forward(self, batch: Batch) -> tuple[jax.Array, None]:
        size = len(batch.tokens) / self.builder.buckets.max_seqs
        share = _FIXED + (1 - _FIXED) * min(size, 1.0) + _MORE * max(size - 1.0, 0.0)
        self._free = max(self._free, time.monotonic()) + self._step_seconds * share
        self._ends.append(self._free)
        return self._empty.forward(batch)

    def sample(self, logits: jax.Array, sampling: Sampling, rows: np.ndarray) -> Output:
        return self._empty.sample(logits, sampling, rows)

    def fetch(self, output: Output | None, logits: jax.Array) -> Output | None:
        found = jax.device_get(output)
        time.sleep(max(0.0, self._ends.popleft() - time.monotonic()))
        if found is not None:
            tokens = self._random.integers(3, self.config.vocab_size, len(found.tokens), np.int32)
            found = dataclasses.replace(found, tokens=tokens)
        return found

    def warm_up(self, *, adapters: bool, base: bool = True, **_: Any) -> None:
        """Compiles the empty programs of all shapes but the samplers of what a load test does not ask for."""
        for shape in self.programs.step_shapes(adapters=adapters, base=base):
            self._empty.forward(self.programs.padding(shape))
        gc.collect()  # as a Runner does
        gc.freeze()


if __name__ == "__main__":
    install(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))

"""The engine's compiled programs: steps and samplers, one for each padded shape, compiled ahead on several threads."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
import dataclasses
import functools
import os
from pathlib import Path
import threading
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from sharding import LOGITS, WHOLE, ShardedTable
from slora_jax.batch import Batch, Output, Sampling, State
from slora_jax.batch_builder import BatchBuilder
from slora_jax.executable_cache import ExecutableCache
from slora_jax.kernel_names import unify_kernel_names
from slora_jax.parallel import local_config
from slora_jax.program_shapes import SampleShape, StepOptions, StepShape
from slora_jax.sampling_batch import sampling_shapes
from slora_jax.step import Forward, Params, compiler_options, make_forward, make_sample

Progress = Callable[[int, int, str], None]
_THREADS = 8  # compiling at once; XLA works without the interpreter's lock
_COLLECTIVE_KERNEL_TOKENS = 128
"""Larger sharded steps leave all-reduces to NCCL. XLA's own kernels lie in command buffers, which suits small steps,
but each all-reduce of each program keeps memory that is not XLA's pool's: megabytes, 161 times in a step of 80 layers.
On four H200s there was none left after ten such programs.
"""


def _with_last_tokens(forward: Forward) -> Callable[..., tuple[State, Any]]:
    """A step that finds tokens the host does not know among those that were sampled last."""

    def step(params: Params, state: State, last: jax.Array, batch: Batch) -> tuple[State, Any]:
        tokens = jnp.where(batch.tokens < 0, last[jnp.maximum(-1 - batch.tokens, 0)], batch.tokens)
        return forward(params, state, dataclasses.replace(batch, tokens=tokens))

    return step


def _into_last_tokens(sample: Callable[[jax.Array, Sampling], Output]) -> Callable[..., tuple[Output, jax.Array]]:
    """A sampler that also notes each row's token among the last ones."""

    def choose(logits: jax.Array, sampling: Sampling, last: jax.Array, rows: jax.Array) -> tuple[Output, jax.Array]:
        output = sample(logits, sampling)
        return output, last.at[rows].set(output.tokens, mode="drop")

    return choose


def _named(function: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    """The function under a name of its own, which is the program's."""

    @functools.wraps(function)
    def named(*args):
        return function(*args)

    named.__name__ = f"{function.__name__}_{suffix}"
    return named


class Programs:
    """Finds the program of a shape, and compiles it if need be.

    The number of pages is part of a step's shape, but no pool is needed to compile: so programs are compiled first, and
    the pool gets the memory that they leave.

    compiles: programs that were compiled or loaded because a call needed them. cache_dir: see ExecutableCache; None
    keeps nothing, nor does a model on several devices, whose programs only JAX's own cache keeps.
    """

    def __init__(self, options: StepOptions, params: Params, builder: BatchBuilder, cache_dir: Path | None = None):
        self.options = options
        self.builder = builder
        self.compiles = 0
        self._params = params
        self._steps: dict[StepShape, jax.stages.Compiled] = {}
        self._samplers: dict[SampleShape, jax.stages.Compiled] = {}
        # Lowering is Python: one at a time, so that XLA compiles the first program while the next is lowered.
        self._lowering = threading.Lock()
        self._cache: ExecutableCache | None = None
        if cache_dir is not None and options.parallel is None:
            specs = {name: (array.shape, array.dtype.name) for name, array in params.items()}
            self._cache = ExecutableCache(
                cache_dir, (options, specs, builder.num_pages, builder.table_pages, builder.buckets.max_seqs)
            )
        self._whole = NamedSharding(options.parallel.mesh, WHOLE) if options.parallel else None
        forward = make_forward(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)})
        plain, hidden = None, None  # shardings of what steps return
        self._logits = None
        if options.parallel:
            self._logits = NamedSharding(options.parallel.mesh, LOGITS)
            state = State(pages=options.parallel.pool)
            plain, hidden = (state, self._logits), (state, (self._logits, self._whole))
        name = self._cache.name if self._cache else ""
        step = _named(_with_last_tokens(forward), name)
        common: dict[str, Any] = dict(donate_argnums=1, compiler_options=compiler_options())
        self._step = jax.jit(step, out_shardings=plain, **common)
        self._hidden_step = jax.jit(step, out_shardings=hidden, **common)
        self._sample = jax.jit(
            _named(_into_last_tokens(make_sample(options.parallel)), name), donate_argnums=2, out_shardings=self._whole
        )

    def forward(
        self, params: Params, state: State, last: jax.Array, batch: Batch
    ) -> tuple[State, jax.Array, jax.Array | None]:
        """A step: the new state, logits, and the rows' hidden states if the batch asks for them. Tokens of the batch
        that are negative, -1 - row, are taken from `last`.
        """
        shape = StepShape.of(batch)
        program = self._steps.get(shape)
        if program is None:
            self.compiles += 1
            program = self._steps[shape] = self._compile_step(shape, batch)
        state, found = program(params, state, last, batch)
        return (state, *found) if shape.hidden else (state, found, None)

    def sample(
        self, logits: jax.Array, sampling: Sampling, last: jax.Array, rows: np.ndarray
    ) -> tuple[Output, jax.Array]:
        """Tokens for rows of logits, and `last`, which is donated, with those of `rows` in their places."""
        shape = SampleShape.of(sampling)
        program = self._samplers.get(shape)
        if program is None:
            self.compiles += 1
            program = self._samplers[shape] = self._compile_sampler(shape, sampling)
        return program(logits, sampling, last, rows)

    def step_shapes(self, *, adapters: bool, base: bool = True, embeddings: bool = False) -> list[StepShape]:
        """Every shape that a step can have, the largest first. adapters: of steps in which one is used. base: of steps
        in which none is. embeddings: of steps whose hidden states are wanted, too. Where the builder may promise few
        adapters, small steps have two shapes with them.
        """
        buckets = self.builder.buckets
        sizes = [(buckets.max_seqs, buckets.tokens[-1], buckets.wide_rows, False)]
        sizes += [(buckets.max_seqs, n, buckets.max_seqs, False) for n in reversed(buckets.tokens)]
        sizes += [(n, n, n, True) for n in reversed(buckets.seqs)]
        if self.builder.deterministic:
            return [StepShape(*sizes[0], True, True), StepShape(*sizes[-1], True)]
        kinds = [(*size, used) for size in sizes for used in [True] * adapters + [False] * base]
        shapes = [StepShape(*kind) for kind in kinds]
        small = [shape for shape in shapes if shape.use_adapters and self.builder.may_promise_few(shape.tokens)]
        shapes += [dataclasses.replace(shape, few=True) for shape in small]
        if embeddings:
            shapes += [dataclasses.replace(shape, hidden=True) for shape in shapes if not shape.decode_only]
        return shapes

    def compile_ahead(
        self,
        *,
        adapters: bool,
        base: bool = True,
        embeddings: bool = False,
        greedy_only: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Compiles all that serving can need, on several threads. adapters, base, embeddings: see step_shapes.
        greedy_only: no samplers for anything but the likeliest token, and no steps for log-probabilities of prompts.
        """
        shapes = self.step_shapes(adapters=adapters, base=base, embeddings=embeddings)
        steps = [s for s in shapes if s not in self._steps]
        buckets = self.builder.buckets
        if greedy_only and not self.builder.deterministic:
            steps = [s for s in steps if s.rows < buckets.wide_rows]
        sizes = (buckets.seqs, buckets.wide_rows, self.builder.max_model_len, self.options.config.vocab_size)
        samplings = sampling_shapes(*sizes, greedy_only=greedy_only, deterministic=self.builder.deterministic)
        kinds = {SampleShape.of(s): s for s in samplings}
        samplers = [(shape, s) for shape, s in kinds.items() if shape not in self._samplers]
        total = len(steps) + len(samplers)
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            jobs: dict[Any, tuple[dict[Any, Any], Any]] = {}
            for step in steps:
                jobs[threads.submit(self._compile_step, step, self.padding(step))] = (self._steps, step)
            for shape, sampling in samplers:
                jobs[threads.submit(self._compile_sampler, shape, sampling)] = (self._samplers, shape)
            try:
                for done, job in enumerate(as_completed(jobs)):
                    programs, shape = jobs[job]
                    programs[shape] = job.result()
                    if progress:
                        progress(done + 1, total, str(shape))
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    def temp_bytes(self, shape: StepShape | None = None) -> int:
        """Memory that programs need beside their arguments, in bytes: of one step, or the largest of all compiled."""
        programs = [self._steps[shape]] if shape else [*self._steps.values(), *self._samplers.values()]
        need = 0
        for program in programs:
            analysis = program.memory_analysis()
            assert analysis is not None, "the backend does not tell how much memory a program needs"
            need = max(need, analysis.temp_size_in_bytes)
        return need

    def buffers(self, most_tokens: int) -> Counter[int]:
        """Memory that steps of up to `most_tokens` tokens and samplers allocate on a device and give back: bytes -> how
        many buffers of them are alive at a time. Logits of one step are, while the next one's are written.
        """
        parallel = self.options.parallel
        columns = (local_config(self.options.config, parallel.layout) if parallel else self.options.config).vocab_size
        small = {shape: program for shape, program in self._steps.items() if shape.tokens <= most_tokens}
        found: Counter[int] = Counter()
        for program in [*small.values(), *self._samplers.values()]:
            analysis = program.memory_analysis()
            if analysis is not None:
                found[analysis.temp_size_in_bytes] = 1
        for rows in {shape.rows for shape in self._steps}:
            found[rows * columns * 4] += 2
        return found

    def compile(self, shape: StepShape) -> None:
        """Compiles one step."""
        if shape not in self._steps:
            self._steps[shape] = self._compile_step(shape, self.padding(shape))

    def compiled_steps(self) -> list[StepShape]:
        return list(self._steps)

    def step(self, shape: StepShape) -> jax.stages.Compiled:
        """The program of a step that was compiled. Arguments: parameters, state, last tokens, batch."""
        return self._steps[shape]

    def padding(self, shape: StepShape) -> Batch:
        """A batch of a shape that holds no token."""
        return self.builder.padding(
            shape.seqs,
            shape.tokens,
            decode_only=shape.decode_only,
            use_adapters=shape.use_adapters,
            rows=shape.rows,
            hidden=shape.hidden,
            few_adapters=shape.few,
        )

    def _spec(self, x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=self._whole)

    def _last(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.builder.buckets.max_seqs,), jnp.int32, sharding=self._whole)

    def _state(self) -> State:
        cfg, parallel = self.options.config, self.options.parallel
        elements = parallel.page_elements if parallel else cfg.geometry.page_elements
        where = parallel.pool if parallel else None
        shape = (cfg.num_layers, self.builder.num_pages, elements)
        return State(pages=jax.ShapeDtypeStruct(shape, self.options.dtype, sharding=where))

    def _compile_step(self, shape: StepShape, batch: Batch) -> jax.stages.Compiled:
        specs: Batch = jax.tree.map(self._spec, batch)
        parallel = self.options.parallel
        if parallel is not None and jax.process_count() == 1:  # between processes the table travels whole
            placed = jax.tree.map(
                lambda x, spec: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=NamedSharding(parallel.mesh, spec)),
                batch.adapters,
                ShardedTable.specs(),
            )
            specs = dataclasses.replace(specs, adapters=placed)
        args = (self._params, self._state(), self._last(), specs)
        if shape.hidden:
            return self._get(shape, self._hidden_step, args, (State(pages=0), (0, 0)))
        return self._get(shape, self._step, args, (State(pages=0), 0))

    def _compile_sampler(self, shape: SampleShape, sampling: Sampling) -> jax.stages.Compiled:
        columns = self.options.config.vocab_size
        if parallel := self.options.parallel:  # filled up where it does not divide
            columns = parallel.layout.devices * local_config(self.options.config, parallel.layout).vocab_size
        logits = jax.ShapeDtypeStruct((shape.rows, columns), jnp.float32, sharding=self._logits)
        rows = jax.ShapeDtypeStruct((shape.rows,), jnp.int32, sharding=self._whole)
        specs = jax.tree.map(self._spec, sampling)
        given = 0 if shape.logprobs else None
        top = 0 if shape.top_logprobs else None
        output = Output(tokens=0, finite=0, logprobs=given, top_ids=top, top_logprobs=top)
        return self._get(shape, self._sample, (logits, specs, self._last(), rows), (output, 0))

    def _get(self, shape: Hashable, function: Any, args: Sequence[Any], returns: Any) -> jax.stages.Compiled:
        if self._cache is not None:
            known = self._cache.get(shape, jax.tree.structure((tuple(args), {})), jax.tree.structure(returns))
            if known is not None:
                return known
        with self._lowering:
            lowered = function.lower(*args)
            unify_kernel_names(lowered)
        if self._cache is not None:
            return self._cache.compile(shape, lowered)
        large = isinstance(shape, StepShape) and shape.tokens > _COLLECTIVE_KERNEL_TOKENS
        if self.options.parallel is not None and large and jax.default_backend() == "gpu":
            return lowered.compile({"xla_gpu_experimental_use_collective_kernels": ""})
        return lowered.compile()

"""Makes the device side of an engine: how many pages, compiled steps, then the pool."""

import logging
from typing import Any

import jax

from slora_jax.buckets import Buckets
from slora_jax.engine_config import ResolvedConfig
from slora_jax.errors import CapacityError, SloraError
from slora_jax.followers import make_runner as make_leader
from slora_jax.loading import LoadedModel
from slora_jax.memory import choose_num_pages, device_memory, fitting_pages, steps_dir
from slora_jax.program_shapes import StepOptions
from slora_jax.progress import progress_bar
from slora_jax.runner import Runner

logger = logging.getLogger(__name__)


def make_runner(
    model: LoadedModel,
    settings: ResolvedConfig,
    max_model_len: int,
    options: StepOptions,
    *,
    adapters: bool,
) -> Runner:
    """A Runner with its pool. With settings.warm_up every step is compiled before the pool is made, so that the pool
    takes what they really leave, and compiling has memory to try things out in.

    A step is compiled for a number of pages. Should all of them together turn out to need more than the largest one
    did, they are compiled again for fewer pages: that happens at most once for a model and its settings, as programs
    are kept, and costs no memory, which a larger margin would.

    In process 0 of several the Runner leads the others, which never return from here; there steps are compiled ahead
    in process 0 only, and the number of pages stays as it was chosen.

    adapters: whether steps in which adapters are used are compiled, too.
    Raises CapacityError naming what does not fit.
    """
    default = Buckets.default(settings.max_seqs, settings.max_step_tokens, gpu=jax.default_backend() == "gpu")
    buckets = Buckets(seqs=settings.seq_buckets or default.seqs, tokens=settings.token_buckets or default.tokens)
    num_pages = choose_num_pages(options, model.params, settings, buckets, max_model_len)
    ahead: dict[str, Any] = dict(
        adapters=adapters, embeddings=settings.embeddings, greedy_only=settings.warm_up == "greedy"
    )
    while True:
        runner = make_leader(
            options=options,
            params=model.params,
            num_pages=num_pages,
            buckets=buckets,
            max_model_len=max_model_len,
            cache_dir=steps_dir(settings),
            deterministic=settings.deterministic,
            few_adapters=settings.few_adapters and settings.implementation != "xla",
            chunk_bytes=settings.adapter_chunk_bytes,
        )
        if not settings.warm_up:
            break
        with progress_bar("compiling", settings.progress) as progress:
            runner.programs.compile_ahead(**ahead, progress=progress)
        if settings.page_pool_bytes is not None or device_memory() is None or jax.process_count() > 1:
            break
        fits = fitting_pages(options, settings, buckets, runner.programs.temp_bytes())
        if fits >= num_pages:
            break
        if not fits:
            raise CapacityError("no memory is left for the page pool beside the compiled steps; lower max_step_tokens")
        logger.info("the steps need more memory than the largest: %d pages instead of %d", fits, num_pages)
        num_pages = fits
    runner.reset()
    if settings.warm_up:
        runner.warm_up(**ahead)
    return runner


def take_over(runner: Runner, model: LoadedModel, settings: ResolvedConfig, max_model_len: int) -> int:
    """Makes a Runner forget the engine that it belonged to, and says how many of its pages another one may use.
    Its steps stay as they are: settings.few_adapters is not asked.

    Raises SloraError naming what the Runner was not made for.
    """
    builder = runner.builder
    if runner.params is not model.params:
        raise SloraError("the runner was made for another model")
    for name, wanted, most in (
        ("max_seqs", settings.max_seqs, builder.buckets.max_seqs),
        ("max_step_tokens", settings.max_step_tokens, builder.buckets.tokens[-1]),
        ("max_model_len", max_model_len, builder.max_model_len),
        ("page_pool_bytes", settings.page_pool_bytes or 0, runner.num_pages * runner.page_bytes),
    ):
        if wanted > most:
            raise SloraError(f"{name} {wanted} is more than the {most} that the runner was made for")
    if settings.deterministic != builder.deterministic:
        raise SloraError("the runner was made with another setting of deterministic")
    builder.forget()
    return settings.page_pool_bytes // runner.page_bytes if settings.page_pool_bytes else runner.num_pages

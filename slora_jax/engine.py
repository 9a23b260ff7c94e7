"""The Engine: one base model, many adapters, all requests in one batch."""

from collections.abc import Mapping
import contextlib
import dataclasses
import gc
import logging
import os
from typing import Any

import jax

from pallas_kernels.geometry import PAGE_TOKENS
from slora_jax.adapter_loader import AdapterLoader
from slora_jax.adapters import AdapterReader
from slora_jax.admission import Admission
from slora_jax.core import EngineCore
from slora_jax.delivery import Delivery
from slora_jax.engine_adapters import EngineAdapters, check_settings, read_contents, refusals
from slora_jax.engine_config import EngineConfig
from slora_jax.engine_embeddings import EngineEmbeddings
from slora_jax.engine_loop import EngineLoop
from slora_jax.engine_requests import EngineRequests
from slora_jax.errors import SloraError
from slora_jax.jobs import Generation
from slora_jax.layout_choice import choose_parallel
from slora_jax.loading import LoadedModel, load_config, load_model
from slora_jax.memory import check_weights_fit, num_weights, step_options
from slora_jax.model_config import ModelConfig
from slora_jax.page_loads import PageLoads
from slora_jax.page_pool import PagePool
from slora_jax.page_uses import page_map, used_pages
from slora_jax.parallel import Parallel, param_shards, shard_params
from slora_jax.policies import Quotas, make_policy
from slora_jax.prefix_cache import prefix_stats
from slora_jax.progress import progress_bar
from slora_jax.registry import AdapterRegistry, Contents, shapes_of
from slora_jax.runner import Runner
from slora_jax.scheduler import Scheduler
from slora_jax.startup import make_runner, take_over

logger = logging.getLogger(__name__)

_HOST_TO_DEVICE_BYTES_PER_SECOND = 40e9  # measured from pinned memory on an H200; sets what evicting an adapter costs
_PROMPT_OPERATIONS_PER_SECOND = 600e12  # the same for evicting a prefix; bfloat16 on an H200


class Engine(EngineRequests, EngineAdapters, EngineEmbeddings):
    """Serves requests on one base model, each with its own adapter or none.

    Make one with from_pretrained. Methods may be called from any thread; a thread of the engine's own runs the model,
    another hands out answers.
    Use it as a context manager, or call close.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        adapters: Mapping[str, Contents] | None = None,
        parallel: Parallel | None = None,
        runner: Runner | None = None,
    ):
        """adapters: weights, or files that were checked (AdapterReader.check), by name. parallel: what the model was
        loaded for; None follows config.tensor_parallel. runner: of an engine of this model that was closed, to use its
        compiled steps and its pool again; `config` must not ask for more sequences, tokens or pages than it has.
        """
        adapters = adapters or {}
        shapes = shapes_of(adapters)
        settings = config.resolved()
        if settings.compile_cache_dir:
            jax.config.update("jax_compilation_cache_dir", settings.compile_cache_dir)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # there are many small samplers
        self.settings = settings
        self.parallel = parallel or choose_parallel(model.config, settings, len(adapters), shapes)
        if self.parallel:
            params = shard_params(model.config, model.params, self.parallel)
            model = dataclasses.replace(model, params=params)
        self.model = model
        self.max_model_len = min(settings.max_model_len or model.config.max_position, model.config.max_position)
        self._registry = AdapterRegistry()
        for name, adapter in adapters.items():
            self._registry.add(name, adapter)
        named = {record.shape: name for name, record in self._registry.items()}
        for shape, name in named.items():  # before anything is compiled for them
            check_settings(name, shape, settings)
        if runner is None:
            runner = make_runner(
                model,
                settings,
                self.max_model_len,
                step_options(model.config, settings, shapes, self.parallel),
                adapters=bool(adapters) or settings.max_lora_rank is not None,
            )
            num_pages = runner.num_pages
        else:
            num_pages = take_over(runner, model, settings, self.max_model_len)
            for shape in shapes:
                runner.require_adapters(shape.max_rank, shape.groups)
        buckets = runner.builder.buckets
        pool = PagePool(num_pages)
        scheduler = Scheduler(
            pool,
            max_seqs=settings.max_seqs,
            max_step_tokens=settings.max_step_tokens,
            deterministic=settings.deterministic,
            max_prompt_rows=buckets.wide_rows - buckets.max_seqs,
            policy=make_policy(settings.policy, settings.policy_options),
            quotas=Quotas(settings.adapter_quota, settings.adapter_quotas),
            prefix_page_cost=_prefix_page_cost(model.config) if settings.prefix_caching else None,
            prompt_gap=settings.prompt_gap,
            loads=PageLoads(
                runner.chunk_pages,
                settings.adapter_step_bytes and max(1, settings.adapter_step_bytes // runner.page_bytes),
            ),
        )
        self._images = runner.images
        self._reader = AdapterReader(model.config)
        loader = AdapterLoader(settings.host_adapter_bytes, runner.images, self._reader, self._adapters_read)
        self._delivery = Delivery(self._stopped)
        self._core = EngineCore(
            runner,
            pool,
            scheduler,
            self._registry,
            loader,
            self._delivery.put,
            page_seconds=runner.page_bytes / _HOST_TO_DEVICE_BYTES_PER_SECOND,
            overlap=settings.overlap,
        )
        try:
            for shape, name in named.items():
                self._check_shape(name, shape)
        except SloraError:
            loader.close()
            self._delivery.close()
            raise
        self._admission = Admission(model, self.max_model_len, scheduler, self._registry.get, self._core.tiers.use)
        self._loop = EngineLoop(self._core)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        config: EngineConfig | None = None,
        adapters: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    ) -> "Engine":
        """Loads a base model and adapters.

        model: a Hugging Face directory or id, a GGUF file, a directory written by ``slora-jax convert``, or
        "random:llama-2-7b".
        adapters: name -> PEFT directory, Hugging Face id, or arrays (see read_adapter); or a directory whose
        subdirectories are PEFT directories, named by them, which are checked now and read when they are needed (see
        add_adapter_directory; those that are refused are logged).
        Raises ModelError, AdapterError or CapacityError naming what is wrong, before anything is placed on the device
        where possible.
        """
        settings = (config or EngineConfig()).resolved()
        architecture = load_config(model)
        if settings.tensor_parallel == 1:
            check_weights_fit(architecture, settings.dtype, model)
        reader = AdapterReader(architecture)
        read: Mapping[str, Contents]
        if isinstance(adapters, str | os.PathLike):
            found, refused = reader.check_all(adapters)
            unfit = refusals(found, lambda name, shape: check_settings(name, shape, settings))
            for reason in (refused | unfit).values():
                logger.warning("not added: %s", reason)
            read = {name: files for name, files in found.items() if name not in unfit}
        else:
            sources = adapters or {}
            read = {name: read_contents(name, source, reader, architecture) for name, source in sources.items()}
        parallel = choose_parallel(architecture, settings, len(read), shapes_of(read))
        if parallel:
            check_weights_fit(architecture, settings.dtype, model, parallel)
        with progress_bar("loading", settings.progress) as progress:
            loaded = load_model(
                model,
                dtype=settings.dtype,
                weight_dtype=settings.weight_dtype,
                shardings=param_shards(architecture, parallel) if parallel else None,
                progress=progress,
            )
        return cls(loaded, settings, read, parallel)

    def warm_up(self, *, adapters: bool, base: bool = True, greedy_only: bool = False) -> None:
        """Compiles every step shape now, up to the largest rank registered. What is asked meanwhile waits. With
        EngineConfig.warm_up it was done at start, when it leaves the pool more memory.

        adapters: the shapes of steps in which some request uses an adapter. base: those of steps in which none does.
        greedy_only: only those samplers that choose the likeliest token and tell nothing else.
        Raises CapacityError if a step does not fit in the device's memory.
        """
        with progress_bar("compiling", self.settings.progress) as progress:
            kinds: dict[str, Any] = dict(adapters=adapters, base=base, embeddings=self.settings.embeddings)
            kinds |= dict(greedy_only=greedy_only, progress=progress)
            self._loop.call(lambda: self._core.runner.warm_up(**kinds))

    def longest(self, adapter: str | None = None) -> int:
        """Tokens that a prompt and its answer may have together, as far as the model and the pool go. AdapterError if
        the adapter is unknown.
        """
        pages = self._images.num_pages(self._registry.get(adapter).shape) if adapter is not None else 0
        # the last token is never fed back, so it needs no place
        return min(self.max_model_len, (self._core.pool.num_pages - pages) * PAGE_TOKENS + 1)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the present: running, waiting, pages by use, hits of the prefix cache, and
        hits, loads and evictions of each tier of adapters (docs/adapters.md). step_seconds: where the seconds of steps
        went, on the host and on the device (StepTimes).

        compiles: programs that were compiled while serving, because a step needed them: 0 after a full warm-up.
        """

        def collect() -> dict[str, Any]:
            core = self._core
            return dict(
                **core.counters,
                step_seconds=core.times.as_dict(),
                compiles=core.runner.compiles,
                running=len(core.scheduler.running),
                waiting=len(core.scheduler.waiting),
                pages=used_pages(core.pool),
                prefix_cache=prefix_stats(core.scheduler.prefixes),
                num_pages=core.pool.num_pages,
                page_bytes=core.runner.page_bytes,
                adapters=len(self._registry),
                adapter_loads=core.tiers.page_loads,
                adapter_tiers=core.tiers.stats(),
            )

        return self._loop.call(collect)

    def page_map(self) -> list[str | None]:
        """What each page holds: an adapter's digest, "kv", or None if it is free."""
        return self._loop.call(lambda: page_map(self._core.pool))

    def check_integrity(self) -> None:
        """Raises AssertionError if the pool's books are wrong. For tests and debugging."""
        self._loop.call(self._core.pool.check_integrity)

    def close(self) -> None:
        """Aborts what is in flight and stops the engine's threads. The engine takes no requests afterwards."""
        self._loop.close()
        self._core.tiers.close()
        self._delivery.close()
        self._admission.close()
        self._core.runner.close()
        gc.unfreeze()  # see Runner.warm_up

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _stopped(self, generation: Generation) -> None:
        """A stop string ended a completion. On the delivery thread."""
        with contextlib.suppress(SloraError):  # a closed engine computes no more of it anyway
            self._loop.submit(lambda: self._core.stopped(generation))

    def _adapters_read(self) -> None:
        """The loader has something to tell. On any thread."""
        with contextlib.suppress(SloraError):  # a closed engine needs it no more
            self._loop.submit(self._core.adapters_read)


def _prefix_page_cost(config: ModelConfig) -> float:
    """Seconds to compute the keys and values of a page again: two operations a weight and token."""
    return 2 * num_weights(config) * PAGE_TOKENS / _PROMPT_OPERATIONS_PER_SECOND

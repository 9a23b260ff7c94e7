"""One step over whole prompts, without the engine's loop: logits of every position."""

from collections.abc import Sequence as Seq

import jax
from jax import numpy as jnp
import numpy as np

from slora_jax import Adapter, ModelConfig, make_forward
from slora_jax.adapter_pages import adapter_owner
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.page_pool import PagePool
from slora_jax.parallel import Parallel
from slora_jax.placement import adapter_image, adapter_pages, image_sharding, make_write, new_state
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import AdapterUse, Sequence


def prompt_logits(
    config: ModelConfig,
    params,
    prompts: Seq[tuple[Seq[int], Adapter | None]],
    *,
    dtype=jnp.float32,
    max_rank: int = 64,
    last_only: bool = False,
    parallel: Parallel | None = None,
    **options,
) -> list[np.ndarray]:
    """Float32 logits [n, V] of each prompt under its adapter (or [1, V] of its last position), all in one mixed
    batch.
    """
    adapters = {a.digest: a for _, a in prompts if a is not None}
    need = sum(len(p) // 16 + 1 for p, _ in prompts) + sum(
        adapter_pages(a, config, parallel) for a in adapters.values()
    )
    pool = PagePool(need + len(prompts))
    tokens = sum(len(p) for p, _ in prompts)
    scheduler = Scheduler(pool, max_seqs=len(prompts), max_step_tokens=tokens)
    for i, (prompt, adapter) in enumerate(prompts):
        use = AdapterUse(adapter.digest, adapter_pages(adapter, config, parallel)) if adapter else None
        scheduler.add(
            Sequence(
                seq_id=i,
                tokens=list(prompt),
                prompt_len=len(prompt),
                max_tokens=1,
                adapter=use,
                prompt_logprobs=not last_only,
            )
        )
    plan = scheduler.schedule()
    assert len(plan.chunks) == len(prompts)
    state, write = new_state(config, pool.num_pages, dtype, parallel), jax.jit(make_write(parallel), donate_argnums=0)
    for load in plan.loads:
        digest = load.adapter.digest
        image = adapter_image(adapters[digest], config, np.dtype(dtype), parallel)
        pages = jnp.array(pool.pages(adapter_owner(digest)))
        state = write(state, pages, jax.device_put(image, image_sharding(parallel)))
    buckets = Buckets(seqs=(len(prompts),), tokens=(tokens,))
    layout = parallel.layout if parallel else None
    builder = BatchBuilder(config.geometry, buckets, pool.num_pages, max(len(p) for p, _ in prompts) + 1, layout)
    batch, rows = builder.build(plan.chunks, pool, adapters)
    options |= dict(dtype=dtype, max_rank=max_rank, parallel=parallel)
    forward = jax.jit(make_forward(config, **options), donate_argnums=1)
    logits = np.asarray(forward(params, state, batch)[1])[:, : config.vocab_size]
    result: list[list[np.ndarray]] = [[] for _ in prompts]
    for i, row in enumerate(rows):
        result[row.chunk.seq.seq_id].append(logits[i])
    return [np.stack(r) for r in result]

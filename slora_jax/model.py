"""A functional Llama in Flax over the page pool.

Parameters are few stacked arrays with the layer axis first (see param_specs); the forward pass takes the pool and page
tables as arguments and returns the new pool. Covers Llama 1/2/3.x, Mistral, Qwen2/2.5 and Qwen3.
"""

import dataclasses
import functools
from typing import Any, Literal

from flax import linen as nn
import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels import (
    GROUPS,
    AdapterTable,
    Implementation,
    add_rms_norm,
    lora_matmul,
    lora_matmul_silu_mul,
    paged_attention,
    rope_write_kv,
    silu_mul,
)
from sharding import Layout, ShardedTable, SplitVocabulary, embed, project
from slora_jax.batch import Batch
from slora_jax.model_config import ModelConfig, RopeScaling, param_specs


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[Array, "d"]:
    """Angular frequency of each rotary pair, float32[head_dim / 2].

    ``llama3`` scaling follows Hugging Face's ``_compute_llama3_parameters``: long wavelengths are slowed by ``factor``,
    short ones kept, those between interpolated.
    """
    freq = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    turns = scaling.original_max_position * freq / (2 * jnp.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * freq / scaling.factor + smooth * freq


_WEIGHTS = dict(qkv="wqkv", o="wo", gu="wgu", down="wdown")
"""Of each group of projections."""


_LEAST_ROWS = 8
"""For one row XLA converts the whole head to float32 first, which takes three times as long as the product."""


_ROWS = 8
"""XLA pads matrix products of bfloat16 on GPUs to multiples of so many rows and slices the result. Padding tokens spare
every kernel after them a copy of the slice. A single row is a product of its own kind, which needs none.
"""


def _whole_rows(batch: Batch, num_pages: int) -> Batch:
    """The batch with padding tokens up to a multiple of _ROWS, unless it has just one token."""
    tokens = batch.tokens.shape[0]
    more = -tokens % _ROWS if tokens > 1 else 0
    if not more:
        return batch
    pad = lambda array, value=0: jnp.pad(array, (0, more), constant_values=value)  # noqa: E731
    return dataclasses.replace(
        batch,
        tokens=pad(batch.tokens),
        positions=pad(batch.positions),
        page_ids=pad(batch.page_ids, num_pages),
        slots=pad(batch.slots),
    )


def _matmul(x: Float[Array, "T a"], w: Float[Array, "a b"]) -> Float[Array, "T b"]:
    # on GPUs the default for float32 is tf32, which would not be float32
    return jnp.dot(x, w, precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)


class Llama(nn.Module):
    """The forward pass. ``Llama(config).apply({"params": params}, pages, batch)`` returns ``(pages, hidden)``.

    loop: "unroll" lays the layers out one after another, which GPUs need (a loop copies each layer's weights before
    using them); "scan" compiles one layer, which makes compilation short and costs little on a CPU.
    max_rank: bound on the rank of a module of any adapter (sizes an intermediate, nothing else).
    lora_groups: groups of projections that any adapter targets; the others get no LoRA launch.
    layout: None for a whole model; otherwise `config` is one device's part (see slora_jax/parallel.py) and the module
    runs inside shard_map.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.dtype("bfloat16")
    max_rank: int = 64
    lora_groups: tuple[str, ...] = tuple(GROUPS)
    implementation: Implementation = "auto"
    loop: Literal["unroll", "scan"] = "unroll"
    layout: Layout | None = None

    def setup(self):
        init = nn.initializers.normal(0.02)
        self.weights = {
            name: self.param(name, nn.initializers.ones if "norm" in name else init, spec.shape, self.dtype)
            for name, spec in param_specs(self.config).items()
        }

    def __call__(self, pages: Float[Array, "L P E"], batch: Batch):
        """Runs all layers. Returns the pool with the tokens' keys and values, and the final hidden state [T, H]."""
        cfg, num_tokens = self.config, batch.tokens.shape[0]
        batch = _whole_rows(batch, pages.shape[1])
        angles = batch.positions.astype(jnp.float32)[:, None] * rope_frequencies(
            cfg.head_dim, cfg.rope_theta, cfg.rope_scaling
        )
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        table = self.weights["embed"]
        x = table[batch.tokens] if self.layout is None else embed(table, batch.tokens)

        def layer(i, carry):
            pages, x, delta = carry  # delta: the last block's output, added to the residual stream x with the next norm
            with jax.named_scope("attention"):
                x, h = self._add_norm("attn_norm", i, x, delta)
                delta, pages = self._attention(i, h, pages, batch, cos, sin)
            with jax.named_scope("mlp"):
                x, h = self._add_norm("mlp_norm", i, x, delta)
                delta = self._mlp(i, h, pages, batch)
            return pages, x, delta

        if self.loop == "scan":
            pages, x, delta = lax.fori_loop(0, cfg.num_layers, layer, (pages, x, jnp.zeros_like(x)))
        else:
            # traced and lowered once; XLA inlines the calls, and the numbers of the layers are constants again
            call, delta = jax.jit(layer), None
            for i in range(cfg.num_layers):
                pages, x, delta = call(np.int32(i), (pages, x, delta))
        return pages, self._add_norm("final_norm", None, x, delta)[1][:num_tokens]

    def logits(self, hidden: Float[Array, "R H"]) -> Float[Array, "R V"]:
        """Float32 logits of hidden states; over several devices those of this device's part of the vocabulary."""
        head = self.weights["embed" if self.config.tied_embeddings else "lm_head"]
        rows = hidden.shape[0]
        if rows < _LEAST_ROWS and hidden.dtype != jnp.float32:
            hidden = jnp.pad(hidden, ((0, _LEAST_ROWS - rows), (0, 0)))
        logits = jnp.einsum(
            "rh,vh->rv",
            hidden,
            head,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None,
        )[:rows]
        return logits if self.layout is None else SplitVocabulary.of(self.layout).hide_padding(logits)

    def _base(self, x, layer: int | Int[Array, ""], group: str):
        """The projections of ``x`` by a group of modules, without adapters."""
        product = _matmul(x, self.weights[_WEIGHTS[group]][layer])
        return product + self.weights["bqkv"][layer] if self._has_bias(group) else product

    def _has_bias(self, group: str) -> bool:
        return self.config.qkv_bias and group == "qkv"

    def _adapted(self, batch: Batch, group: str) -> bool:
        return batch.use_adapters and group in self.lora_groups

    def _project(self, x, pages, batch: Batch, layer: int | Int[Array, ""], group: str):
        """The same with the adapters' deltas; over several devices also sums what must be summed."""
        base = functools.partial(self._base, x, layer, group)
        weights = None if self._has_bias(group) else self.weights[_WEIGHTS[group]]
        if self.layout is None and not self._adapted(batch, group):
            return base()
        table, segments, options = self._segments(batch, layer)
        if self.layout is None:
            options |= dict(group=group, few_adapters=batch.few_adapters)
            return lora_matmul(x, weights, base, pages, table, table, *segments, **options)
        table = table if self._adapted(batch, group) else None
        return project(x, weights, base, pages, table, *segments, layout=self.layout, **options, group=group)

    def _segments(self, batch: Batch, layer: int | Int[Array, ""]) -> tuple[Any, tuple, dict[str, Any]]:
        """Adapters, segments and options of the LoRA operations."""
        options: dict[str, Any] = dict(layer=layer, max_rank=self.max_rank, implementation=self.implementation)
        if self.layout is None:
            assert isinstance(batch.adapters, AdapterTable), "the batch was built for several devices"
            options |= dict.fromkeys(("shrink_geometry", "expand_geometry"), self.config.geometry)
        else:
            assert isinstance(batch.adapters, ShardedTable), "the batch was built for one device"
        return batch.adapters, (batch.seg_start, batch.seg_adapter), options

    def _add_norm(self, name: str, layer: int | Int[Array, ""] | None, x, delta):
        """``x + delta`` and its norm. layer: None where the weight has no layer axis."""
        weight = self.weights[name]
        weight, layer = (weight[None], 0) if layer is None else (weight, layer)
        options: dict[str, Any] = dict(eps=self.config.norm_eps, implementation=self.implementation)
        return add_rms_norm(x, delta, weight, layer=layer, **options)

    def _attention(self, i, h, pages, batch: Batch, cos, sin):
        cfg, w = self.config, self.weights
        options: dict[str, Any] = dict(layer=i, geometry=cfg.geometry, implementation=self.implementation)
        qkv = self._project(h, pages, batch, i, "qkv")
        norms = (w["q_norm"], w["k_norm"]) if cfg.qk_norm else None
        q, pages = rope_write_kv(
            qkv, cos, sin, pages, batch.page_ids, batch.slots, norms=norms, norm_eps=cfg.norm_eps, **options
        )
        out = paged_attention(
            q,
            pages,
            batch.page_tables,
            batch.q_start,
            batch.kv_lens,
            max_query=batch.max_query,
            sm_scale=cfg.head_dim**-0.5,
            **options,
        ).reshape(-1, cfg.q_size)
        return self._project(out, pages, batch, i, "o"), pages

    def _mlp(self, i, h, pages, batch: Batch):
        if self.layout is None and self._adapted(batch, "gu"):
            base = functools.partial(self._base, h, i, "gu")
            table, segments, options = self._segments(batch, i)
            options["few_adapters"] = batch.few_adapters
            where = pages, table, table, *segments
            h = lora_matmul_silu_mul(h, self.weights[_WEIGHTS["gu"]], base, *where, **options)
        else:
            h = silu_mul(self._project(h, pages, batch, i, "gu"), implementation=self.implementation)
        return self._project(h, pages, batch, i, "down")

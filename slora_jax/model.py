"""A functional Llama in Flax over the page pool.

Parameters are few stacked arrays with the layer axis first (see param_specs); the forward pass takes the pool and page
tables as arguments and returns the new pool. Covers Llama 1/2/3.x, Mistral, Qwen2/2.5 and Qwen3.
"""

from typing import Any, Literal

from flax import linen as nn
import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import GROUPS, AdapterTable, Implementation, lora_expand, lora_shrink, paged_attention, write_kv
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


def _rotate(x: Float[Array, "T n D"], cos: Float[Array, "T d"], sin: Float[Array, "T d"]) -> Float[Array, "T n D"]:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rms_norm(x: Float[Array, "*n c"], weight: Float[Array, "c"], eps: float) -> Float[Array, "*n c"]:
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight


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
        cfg = self.config
        angles = batch.positions.astype(jnp.float32)[:, None] * rope_frequencies(
            cfg.head_dim, cfg.rope_theta, cfg.rope_scaling
        )
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        table = self.weights["embed"]
        x = table[batch.tokens] if self.layout is None else embed(table, batch.tokens)

        def layer(i, carry):
            pages, x = carry
            with jax.named_scope("attention"):
                delta, pages = self._attention(i, x, pages, batch, cos, sin)
                x = x + delta
            with jax.named_scope("mlp"):
                x = x + self._mlp(i, x, pages, batch)
            return pages, x

        if self.loop == "scan":
            pages, x = lax.fori_loop(0, cfg.num_layers, layer, (pages, x))
        else:
            for i in range(cfg.num_layers):
                pages, x = layer(i, (pages, x))
        return pages, _rms_norm(x, self.weights["final_norm"], cfg.norm_eps)

    def logits(self, hidden: Float[Array, "R H"]) -> Float[Array, "R V"]:
        """Float32 logits of hidden states; over several devices those of this device's part of the vocabulary."""
        head = self.weights["embed" if self.config.tied_embeddings else "lm_head"]
        logits = jnp.einsum(
            "rh,vh->rv",
            hidden,
            head,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None,
        )
        return logits if self.layout is None else SplitVocabulary.of(self.layout).hide_padding(logits)

    def _project(self, x, base, pages, batch: Batch, layer: int | Int[Array, ""], group: str):
        """Adds the adapters' deltas of a group of modules to the base projections of ``x``; over several devices also
        sums what must be summed.
        """
        options: dict[str, Any] = dict(
            layer=layer, group=group, max_rank=self.max_rank, implementation=self.implementation
        )
        adapted = batch.use_adapters and group in self.lora_groups
        if self.layout is not None:
            assert isinstance(batch.adapters, ShardedTable), "the batch was built for one device"
            table = batch.adapters if adapted else None
            return project(x, base, pages, table, batch.seg_start, batch.seg_adapter, layout=self.layout, **options)
        if not adapted:
            return base
        assert isinstance(batch.adapters, AdapterTable), "the batch was built for several devices"
        options["geometry"] = self.config.geometry
        where = (pages, batch.adapters, batch.seg_start, batch.seg_adapter)
        return lora_expand(base, lora_shrink(x, *where, **options), *where, **options)

    def _attention(self, i, x, pages, batch: Batch, cos, sin):
        cfg, w = self.config, self.weights
        h = _rms_norm(x, w["attn_norm"][i], cfg.norm_eps)
        qkv = _matmul(h, w["wqkv"][i])
        if cfg.qkv_bias:
            qkv = qkv + w["bqkv"][i]
        qkv = self._project(h, qkv, pages, batch, i, "qkv")
        q, k, v = jnp.split(qkv, [cfg.q_size, cfg.q_size + cfg.kv_size], axis=-1)
        q = q.reshape(-1, cfg.num_heads, cfg.head_dim)
        k = k.reshape(-1, cfg.num_kv_heads, cfg.head_dim)
        v = v.reshape(-1, cfg.num_kv_heads, cfg.head_dim)
        if cfg.qk_norm:
            q = _rms_norm(q, w["q_norm"][i], cfg.norm_eps)
            k = _rms_norm(k, w["k_norm"][i], cfg.norm_eps)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        pages = write_kv(
            pages,
            k,
            v,
            batch.page_ids,
            batch.slots,
            layer=i,
            geometry=cfg.geometry,
            implementation=self.implementation,
        )
        out = paged_attention(
            q,
            pages,
            batch.page_tables,
            batch.q_start,
            batch.kv_lens,
            layer=i,
            geometry=cfg.geometry,
            max_query=batch.max_query,
            sm_scale=cfg.head_dim**-0.5,
            implementation=self.implementation,
        ).reshape(-1, cfg.q_size)
        return self._project(out, _matmul(out, w["wo"][i]), pages, batch, i, "o"), pages

    def _mlp(self, i, x, pages, batch: Batch):
        cfg, w = self.config, self.weights
        h = _rms_norm(x, w["mlp_norm"][i], cfg.norm_eps)
        gate, up = jnp.split(self._project(h, _matmul(h, w["wgu"][i]), pages, batch, i, "gu"), 2, axis=-1)
        h = nn.silu(gate) * up
        return self._project(h, _matmul(h, w["wdown"][i]), pages, batch, i, "down")

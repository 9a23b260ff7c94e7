"""Settings of an engine."""

from collections.abc import Iterable, Mapping
import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import jax

from pallas_kernels import Implementation
from pallas_kernels.dispatch import hopper_available
from pallas_kernels.geometry import MODULES
from slora_jax.adapters.targets import MODULE_NAMES
from slora_jax.errors import SloraError
from slora_jax.policies import Quota, make_policy


def _default_cache_dir() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(base) / "slora-jax" / "compiled")


def _free_host_bytes() -> int:
    """What host_adapter_bytes is by default."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(min(free // 2, 48 << 30), 1 << 30)


def _modules(names: Iterable[str]) -> tuple[str, ...]:
    """Modules by either of their names, in the order of MODULES."""
    found = set()
    for name in names:
        if name not in MODULE_NAMES:
            raise SloraError(f"lora_targets names {name!r}; modules are {', '.join(MODULES)}")
        found.add(MODULE_NAMES[name])
    if not found:
        raise SloraError(f"lora_targets names no module; name some of {', '.join(MODULES)}")
    return tuple(MODULES[index] for index in sorted(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an Engine. The defaults suit one GPU, or a CPU for trying things out.

    dtype: "bfloat16" or "float32" of weights, activations and pool; None takes bfloat16 on a GPU and float32 on a CPU.
    weight_dtype: dtype the weights are rounded to before they are converted to `dtype`; None as the loader sees fit.
    max_model_len: longest prompt plus answer, in tokens; None takes the model's own limit.
    max_seqs: sequences that run at the same time at most; None: 256 on a GPU, 16 on a CPU.
    max_step_tokens: tokens in one step at most (decode tokens and prompt chunks); None: 2048 on a GPU, 256 on a CPU.
    seq_buckets, token_buckets: sizes to which decode steps pad their sequences, and steps with prompt chunks their
        tokens, in increasing order up to max_seqs and max_step_tokens; None takes powers of two, not all of the small
        ones on a GPU. Every size is a program to compile.
    host_adapter_bytes: host memory for adapters that are ready to be copied to pages, pinned where there is a GPU; the
        least recently used leave. None: half of what the host has free, at most 48 GiB (JAX pins up to 64 unless
        XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says otherwise).
    adapter_chunk_bytes: of an adapter that one copy to the device moves. adapter_step_bytes: that are copied at most
        beside a step in which other requests run, to be there for the next; None: any number, before the step. 128 MiB
        take 3 ms at the 43 GB/s of an H200.
    page_pool_bytes: memory for KV cache and adapters; None takes what the GPU has free after the weights and the
        compiled steps' own need, or 1 GiB on a CPU.
    max_lora_rank: largest rank that steps are compiled for; None follows the registered adapters, so that registering
        one of a higher rank than all before compiles the steps anew, as does the first that targets q, k or v, or o,
        or gate or up, or down.
    lora_targets: modules that adapters may target (q, k, v, o, gate, up, down, or PEFT's names q_proj, ...): steps have
        no launches for groups of projections of which none is named, and an adapter that targets others is refused.
        None: any.
    few_adapters: small steps (2 to 64 tokens, and 256 for some shapes of models) whose adapters have 128 ranks or less
        in all, on every module, each counted as 16, 32 or a multiple of 64, take programs of their own, in which on
        Hopper GPUs one kernel does a base projection and the adapters' deltas. They are compiled beside the others. Not
        for deterministic mode or several devices.
    policy: who goes first and who is given up: "fcfs", "cluster", "early-abort", "fair", "gather" or "priority";
        see slora_jax/policies. policy_options: arguments of the policy's class, for instance {"ttft": 6.0}.
    prompt_gap: steps in which nobody starts after one that started all it could, while at least half of max_seqs run:
        the prompts of a few steps cost less in one. 0 starts everybody at once.
    adapter_quota: what each adapter may take; None is no limit. adapter_quotas: the same for single adapters, by name.
    prefix_caching: keep the keys and values of full pages after their request, in pages that nobody needs just now, for
        requests that begin with the same tokens under the same adapter.
    overlap: plan and dispatch a step while the one before it runs; False waits for each step's results first. Answers
        are the same.
    deterministic: an answer is the same bit for bit, log-probabilities too, whatever else is in the batch, and before
        and after preemption or loading an adapter again. Slower: see docs/deterministic.md.
    tensor_parallel: devices that one model is spread over; page_pool_bytes and memory are those of each.
    lora_layout: how adapters are cut for several devices, see docs/sharding.md: "s-lora" (nothing twice, a collective
        for each group of projections), "comm-free" (more bytes, no collectives), or "auto", which takes the cheaper one
        for each group.
    implementation: kernels, "auto", "mosaic" or "xla".
    loop: "unroll" or "scan" over the layers, see Llama; None: unroll where the Hopper kernels run, else scan, because
        the XLA kernels take long to compile.
    warm_up: compile every step and sampler at start instead of when it is first needed; "greedy": only what requests
        need that want nothing but the likeliest token. Steps with adapters are among them if adapters are given at
        start, or max_lora_rank.
    embeddings: steps that Engine.embed needs are among those that warming up compiles. It answers without that, too:
        they are then compiled when they are first needed. Nobody else uses them.
    compile_cache_dir: where compiled steps are kept between runs; "" keeps none. It holds executable code: use a
        directory that only you can write to.
    progress: show progress bars.
    """

    dtype: Literal["bfloat16", "float32"] | None = None
    weight_dtype: Literal["bfloat16", "float32"] | None = None
    max_model_len: int | None = None
    max_seqs: int | None = None
    max_step_tokens: int | None = None
    seq_buckets: tuple[int, ...] | None = None
    token_buckets: tuple[int, ...] | None = None
    page_pool_bytes: int | None = None
    host_adapter_bytes: int | None = None
    adapter_chunk_bytes: int = 64 << 20
    adapter_step_bytes: int | None = 128 << 20
    max_lora_rank: int | None = None
    lora_targets: tuple[str, ...] | None = None
    few_adapters: bool = False
    policy: str = "fcfs"
    policy_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_gap: int = 0
    adapter_quota: Quota | None = None
    adapter_quotas: Mapping[str, Quota] = dataclasses.field(default_factory=dict)
    prefix_caching: bool = True
    overlap: bool = True
    deterministic: bool = False
    tensor_parallel: int = 1
    lora_layout: Literal["auto", "s-lora", "comm-free"] = "auto"
    implementation: Implementation = "auto"
    loop: Literal["unroll", "scan"] | None = None
    warm_up: bool | Literal["greedy"] = False
    embeddings: bool = False
    compile_cache_dir: str = dataclasses.field(default_factory=_default_cache_dir)
    progress: bool = False

    def __post_init__(self):
        counts: tuple[str, ...] = (
            "max_model_len",
            "max_seqs",
            "max_step_tokens",
            "page_pool_bytes",
            "max_lora_rank",
            "tensor_parallel",
        )
        counts += ("host_adapter_bytes", "adapter_chunk_bytes", "adapter_step_bytes")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SloraError(f"{name} must be at least 1, not {value}")
        if self.prompt_gap < 0:
            raise SloraError(f"prompt_gap must not be negative, not {self.prompt_gap}")
        for name, allowed in (
            ("dtype", (None, "bfloat16", "float32")),
            ("weight_dtype", (None, "bfloat16", "float32")),
            ("lora_layout", ("auto", "s-lora", "comm-free")),
            ("implementation", ("auto", "mosaic", "xla")),
            ("loop", (None, "unroll", "scan")),
            ("warm_up", (False, True, "greedy")),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(repr(a) for a in allowed if a)
                raise SloraError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")
        if self.max_lora_rank is not None and self.max_lora_rank > 512:
            raise SloraError(f"max_lora_rank must be at most 512, not {self.max_lora_rank}")
        if self.few_adapters and self.deterministic:
            raise SloraError("few_adapters and deterministic exclude each other: steps then have one program each")
        if self.few_adapters and self.tensor_parallel > 1:
            raise SloraError(f"few_adapters needs tensor_parallel 1, not {self.tensor_parallel}")
        if self.lora_targets is not None:  # one spelling, so that everybody else may compare names
            object.__setattr__(self, "lora_targets", _modules(self.lora_targets))
        make_policy(self.policy, self.policy_options)

    def resolved(self) -> "ResolvedConfig":
        """The same settings with every None that depends on the backend filled in."""
        gpu = jax.default_backend() == "gpu"
        max_seqs = self.max_seqs or (256 if gpu else 16)
        max_step_tokens = self.max_step_tokens or max(2048 if gpu else 256, max_seqs)
        if max_step_tokens < max_seqs:
            raise SloraError(
                f"max_step_tokens {max_step_tokens} is less than max_seqs {max_seqs}: "
                "every running sequence needs a token a step"
            )
        for name, last in (("seq_buckets", max_seqs), ("token_buckets", max_step_tokens)):
            sizes = getattr(self, name)
            if sizes is not None and (list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != last):
                raise SloraError(f"{name} must increase from at least 1 to {last}, not {sizes}")
        if self.deterministic and any(len(sizes or ()) > 1 for sizes in (self.seq_buckets, self.token_buckets)):
            raise SloraError("deterministic steps have one size each; leave seq_buckets and token_buckets out")
        if self.deterministic and max_step_tokens < 4:
            raise SloraError(f"deterministic steps need max_step_tokens of at least 4, not {max_step_tokens}")
        settings: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings |= dict(
            dtype=self.dtype or ("bfloat16" if gpu else "float32"),
            max_seqs=max_seqs,
            max_step_tokens=max_step_tokens,
            host_adapter_bytes=self.host_adapter_bytes or _free_host_bytes(),
            seq_buckets=(max_seqs,) if self.deterministic else self.seq_buckets,
            token_buckets=(max_step_tokens,) if self.deterministic else self.token_buckets,
            loop=self.loop or ("unroll" if self.implementation != "xla" and hopper_available() else "scan"),
        )
        return ResolvedConfig(**settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig in which nothing that depends on the backend is left open. Made by EngineConfig.resolved."""

    dtype: Literal["bfloat16", "float32"]
    max_seqs: int
    max_step_tokens: int
    host_adapter_bytes: int
    loop: Literal["unroll", "scan"]

"""What benchmarks/tensor_parallel.py measures: a model in several layouts, and how much of it fits."""

import argparse
import time
from typing import Literal

import jax

from benchmarks.tensor_parallel_parts import DecodeCase, clones, free_bytes
from pallas_kernels import MODULES
from pallas_kernels.geometry import PAGE_TOKENS
from sharding import CostModel, choose_layout, make_mesh, measure_latency
from slora_jax.adapters import Adapter
from slora_jax.loading import LoadedModel, load_model
from slora_jax.memory import page_bytes
from slora_jax.parallel import Parallel, make_parallel, param_shards
from slora_jax.placement import adapter_pages
from slora_jax.shapes import named_shape
from slora_jax.traces import SETTINGS, Setting

MODELS = {
    setting.shape: setting
    for setting in (
        SETTINGS["S5"],
        SETTINGS["S6"],
        Setting("llama-3.1-70b", (16,), MODULES),
        Setting("tiny-gqa", (8, 16), MODULES),
    )
}
LAYOUTS = ("base", "comm-free", "s-lora", "auto")


class Subject:
    """A model on a mesh in every layout that is compared, and its adapters."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.args, self.name = args, name
        self.setting = MODELS[name]
        self.config = named_shape(name)
        self.counts = sorted({min(n, args.max_seqs) if args.tp == 1 else n for n in args.adapters})
        self.adapters = clones(self.config, self.setting, max(self.counts), args.dtype)
        self.max_rank = max(a.max_rank for a in self.adapters.values())
        # see EngineConfig.loop; compiling unrolled XLA kernels for a CPU would take minutes
        self.loop: Literal["unroll", "scan"] = "unroll" if jax.default_backend() == "gpu" else "scan"
        self.mesh = make_mesh(args.tp)
        self.latency = measure_latency(self.mesh) if args.tp > 1 else 0.0
        self.parallels = {(layout, n): self._parallel(layout, n) for layout in self.layouts() for n in self.counts}
        self._model: LoadedModel | None = None

    def layouts(self) -> tuple[str, ...]:
        return tuple(x for x in LAYOUTS if x in self.args.layouts) if self.args.tp > 1 else ("base", "one-gpu")

    def _parallel(self, layout: str, count: int) -> Parallel | None:
        if self.args.tp == 1:
            return None
        if layout in ("base", "comm-free"):
            return make_parallel(self.config, self.mesh, "comm-free")
        if layout == "s-lora":
            return make_parallel(self.config, self.mesh, "s-lora")
        lora = choose_layout(  # what an engine of max_seqs takes at its start
            self.config.geometry,
            devices=self.args.tp,
            tokens=self.args.max_seqs,
            adapters=min(count, self.args.max_seqs),
            rank=self.max_rank,
            model=CostModel(latency=self.latency),
        )
        return make_parallel(self.config, self.mesh, lora)

    @property
    def model(self) -> LoadedModel:
        if self._model is None:
            start = time.monotonic()
            first = next(iter(self.parallels.values()))
            shards = param_shards(self.config, first) if first else None
            self._model = load_model(f"random:{self.name}", dtype=self.args.dtype, shardings=shards)
            print(f"{self.name} made in {time.monotonic() - start:.1f} s", flush=True)
        return self._model

    def used(self, count: int, seqs: int) -> list[Adapter]:
        return list(self.adapters.values())[: min(count, seqs)]

    def case(self, layout: str, count: int, seqs: int) -> DecodeCase:
        """One program serves every number of adapters of a layout, so the pool has room for the most."""
        pages = self.pages(layout, seqs)
        context = self.context(seqs)
        return DecodeCase(
            config=self.config,
            parallel=self.parallels[layout, count],
            seqs=seqs,
            context=context,
            num_pages=pages + seqs * -(-context // PAGE_TOKENS),
            max_rank=self.max_rank,
            dtype=self.args.dtype,
            use_adapters=layout != "base",
            implementation=self.args.implementation,
            loop=self.loop,
        )

    def pages(self, layout: str, seqs: int) -> int:
        if layout == "base":
            return 1
        counts = [n for n in self.counts if (layout, n) in self.parallels]
        needs = []
        for n in counts:
            used = self.used(n, seqs)
            needs.append(sum(adapter_pages(a, self.config, self.parallels[layout, n]) for a in used))
        return max(needs) + 1

    def context(self, seqs: int) -> int:
        """The same for all layouts: the longest up to --context that leaves room for the adapters in each of them."""
        parallel = next(iter(self.parallels.values()))
        assert self.model is not None  # the weights are in place when the rest is shared out
        free = free_bytes(self.config, self.args.dtype, parallel)
        if free is None:
            return self.args.context
        most = free // page_bytes(self.config, self.args.dtype, parallel)
        left = (most - max(self.pages(x, seqs) for x in self.layouts())) // seqs
        if left < 1:
            raise ValueError(f"{seqs} sequences with their adapters do not fit beside the weights")
        return min(self.args.context, left * PAGE_TOKENS)

    def same(self, count: int) -> str | None:
        """The layout that "auto" comes to, if it is one and the same for all groups."""
        chosen = self.parallels["auto", count]
        assert chosen is not None
        lora = set(chosen.layout.lora)
        return lora.pop() if len(lora) == 1 else None

"""What a load test asks: adapters in directories, and requests for them."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pallas_kernels.geometry import MODULES
from slora_jax import EngineConfig
from slora_jax.adapters.targets import projection_name
from slora_jax.loading import load_config


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request: exactly `answer` tokens are generated. adapter: its name, None for the base model."""

    adapter: str | None
    prompt: list[int]
    answer: int


def write_adapters(directory: Path, args: argparse.Namespace) -> None:
    """PEFT directories a-0, a-1, ... of random weights, float16; adapter i has rank ``ranks[i % len(ranks)]``.

    With args.share_weights those of one rank are one file under many names and differ in lora_alpha only. To the engine
    they are adapters of their own, each with pages and transfers of its own; on disk and in host memory they lie once.
    """
    files = {rank: _tensors(args.model, rank, args.targets.split(",")) for rank in set(args.rank)}
    first: dict[int, Path] = {}
    for index in range(args.adapters):
        rank = args.rank[index % len(args.rank)]
        path = directory / f"a-{index}"
        path.mkdir()
        weights = path / "adapter_model.safetensors"
        alpha = 2.0 * rank
        if not args.share_weights:
            scale = np.float16(1 + index / args.adapters)
            tensors = {name: np.roll(t, index, 1) * scale if "_A" in name else t for name, t in files[rank].items()}
            save_file(tensors, weights)
        elif rank in first:
            alpha *= 1 + index / args.adapters
            os.link(first[rank], weights)
        else:
            save_file(files[rank], weights)
            first[rank] = weights
        modules = [f"{t}_proj" for t in args.targets.split(",")]
        fields = dict(peft_type="LORA", r=rank, lora_alpha=alpha, target_modules=modules)
        (path / "adapter_config.json").write_text(json.dumps(fields))


def _tensors(model: str, rank: int, targets: list[str]) -> dict[str, np.ndarray]:
    config = load_config(model)
    rng = np.random.default_rng(rank)
    tensors = {}
    for layer in range(config.num_layers):
        for module, name in enumerate(MODULES):
            if name in targets:
                prefix = f"base_model.model.{projection_name(layer, module)}"
                shapes = {"A": (rank, config.in_sizes[module]), "B": (config.out_sizes[module], rank)}
                for factor, shape in shapes.items():
                    values = rng.standard_normal(shape, np.float32) / np.sqrt(shape[1])
                    tensors[f"{prefix}.lora_{factor}.weight"] = values.astype(np.float16)
    return tensors


def make_asks(args: argparse.Namespace, count: int, seed: int) -> list[Ask]:
    """`count` requests: of every adapter in turn if they are asked again and again, else of any."""
    rng = np.random.default_rng(seed)
    vocab = load_config(args.model).vocab_size
    numbers = rng.integers(0, max(1, args.adapters), count) if args.distinct == 0 else np.arange(count)
    return [
        Ask(
            f"a-{number % args.adapters}" if args.adapters else None,
            rng.integers(3, vocab, rng.integers(*args.prompt)).tolist(),
            int(rng.integers(*args.answer)),
        )
        for number in numbers.tolist()
    ]


def measured(args: argparse.Namespace) -> list[Ask]:
    """The different requests that are measured; they are asked in turn until args.requests are answered."""
    return make_asks(args, args.requests if args.distinct == 0 else max(args.distinct or 0, args.adapters, 1), seed=1)


def warming(args: argparse.Namespace) -> list[Ask]:
    """Requests before those: short ones, other prompts, the same adapters."""
    return [
        dataclasses.replace(ask, adapter=like.adapter, answer=2)
        for ask, like in zip(make_asks(args, len(measured(args)), seed=2), measured(args), strict=True)
    ]


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """What `slora-jax serve` makes of the options that it is given here."""
    return EngineConfig(
        dtype=args.dtype,
        max_seqs=args.max_seqs,
        max_model_len=args.max_model_len,
        page_pool_bytes=args.page_pool,
        max_lora_rank=max(args.rank),
        lora_targets=tuple(args.targets.split(",")),
        deterministic=args.deterministic,
        seq_buckets=tuple(args.seq_buckets or ()) or None,
        token_buckets=tuple(args.token_buckets or ()) or None,
        warm_up="greedy",
        progress=True,
    )


def serve_flags(args: argparse.Namespace) -> list[str]:
    options = {
        "--max-seqs": args.max_seqs, "--max-model-len": args.max_model_len, "--page-pool": args.page_pool,
        "--max-lora-rank": max(args.rank), "--lora-targets": args.targets, "--dtype": args.dtype,
        "--max-queue": args.streams, "--warm-up": "greedy",
    }  # fmt: skip
    flags = [str(part) for pair in options.items() if pair[1] is not None for part in pair]
    for flag, sizes in (("--seq-buckets", args.seq_buckets), ("--token-buckets", args.token_buckets)):
        flags += [flag, ",".join(map(str, sizes))] if sizes else []
    return [*flags, "--deterministic"] if args.deterministic else flags

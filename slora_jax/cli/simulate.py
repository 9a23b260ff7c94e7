"""``slora-jax simulate``: what a workload would do, predicted without a GPU."""

import argparse
import dataclasses
import json
from pathlib import Path
import sys
from typing import Any

from slora_jax.errors import RequestError, SloraError
from slora_jax.policies import make_policy
from slora_jax.shapes import named_shape
from slora_jax.traces import SETTINGS, Setting, TraceRequest, burst, parse_trace, synthetic_trace
from slora_jax.twin import CostModel, Simulation, SimulationResult, ideal_cost, simulate, summarise


def run(args: argparse.Namespace) -> int:
    setting = _setting(args)
    config = named_shape(setting.shape)
    options = dict(args.policy_option)
    make_policy(args.policy, options)  # named as a mistake before anything is simulated
    for name in ("max_seqs", "max_step_tokens"):
        if getattr(args, name) < 1:
            raise SloraError(f"{name} must be at least 1, not {getattr(args, name)}")
    if args.max_step_tokens < args.max_seqs:
        raise SloraError(f"max_step_tokens {args.max_step_tokens} is less than max_seqs {args.max_seqs}")
    if args.slo <= 0:
        raise SloraError(f"slo must be positive, not {args.slo}")
    trace = _trace(args)
    simulation = Simulation(
        config=config,
        setting=setting,
        cost=CostModel.from_json(args.cost) if args.cost else ideal_cost(config),
        page_pool_bytes=args.page_pool,
        max_seqs=args.max_seqs,
        max_step_tokens=args.max_step_tokens,
        policy=args.policy,
        policy_options=options,
        prefix_caching=not args.no_prefix_caching,
    )
    result = simulate(simulation, trace)
    figures = summarise(result.records, args.slo) | dict(cost_model=simulation.cost.name, counters=result.counters)
    if args.cost:
        floor = summarise(simulate(dataclasses.replace(simulation, cost=ideal_cost(config)), trace).records, args.slo)
        figures["floor_requests_per_second"] = floor["requests_per_second"]
    if args.json:
        text = json.dumps(figures | dict(pages=result.pages), indent=2)
        if args.json == "-":
            print(text)
            return 0
        _write(args.json, text)
    print("\n".join(_table(figures, result)))
    return 0


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise SloraError(f"{path} cannot be written: {error.strerror}") from None


def _setting(args: argparse.Namespace) -> Setting:
    setting = SETTINGS[args.setting]
    return Setting(
        shape=args.shape or setting.shape,
        ranks=tuple(args.rank) if args.rank else setting.ranks,
        targets=tuple(args.target) if args.target else setting.targets,
    )


def _trace(args: argparse.Namespace) -> list[TraceRequest]:
    if args.trace is None:
        trace = synthetic_trace(
            adapters=args.adapters, rate=args.rate, seconds=args.seconds, alpha=args.alpha, cv=args.cv, seed=args.seed
        )
        if not trace:
            raise RequestError("rate times seconds is less than one request; raise one of them")
    else:
        try:
            text = sys.stdin.read() if args.trace == "-" else Path(args.trace).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{args.trace} cannot be read: {error}") from None
        trace = parse_trace(text.splitlines())
    return burst(trace) if args.burst else trace


def _table(figures: dict[str, Any], result: SimulationResult) -> list[str]:
    counters = figures["counters"]
    lines = [
        _line(
            "requests",
            f"{figures['requests']}: {figures['finished']} finished, {figures['aborted']} given up, "
            f"{figures['preemptions']} preemptions",
        ),
        _line(
            "time", f"{figures['seconds']:.1f} s, {counters['steps']:.0f} steps, cost model {figures['cost_model']!r}"
        ),
        _line(
            "throughput",
            f"{figures['requests_per_second']:.2f} requests/s ({figures['steady_requests_per_second']:.2f} in steady "
            f"state), {figures['output_tokens_per_second']:.0f} output tokens/s, "
            f"{figures['tokens_per_second']:.0f} with prompts",
        ),
    ]
    if floor := figures.get("floor_requests_per_second"):
        share = figures["requests_per_second"] / floor
        lines.append(_line("floor", f"{floor:.2f} requests/s by bytes and operations; this is {share:.2f} of it"))
    lines.append(_line("", f"{'mean':>9} {'p50':>9} {'p90':>9} {'p99':>9}"))
    for name, title, unit in (
        ("ttft", "first token", 1),
        ("tpot", "later tokens", 1000),
        ("latency", "whole answer", 1),
    ):
        if spread := figures[name]:
            numbers = " ".join(f"{spread[key] * unit:9.3f}" for key in ("mean", "p50", "p90", "p99"))
            lines.append(_line(title, f"{numbers} {'ms' if unit == 1000 else 's'}"))
    lines.append(
        _line("objective", f"attainment {figures['slo_attainment']:.3f}, satisfaction {figures['satisfaction']:.3f}")
    )
    if figures["adapter_fairness"] is not None:
        lines.append(_line("fairness", f"{figures['adapter_fairness']:.3f} (Jain's index over adapters)"))
    if result.pages:
        total = sum(value for name, value in result.pages[0].items() if name != "seconds")
        for name in ("kv", "idle_kv", "adapter", "idle_adapter", "free"):
            used = [row[name] / total for row in result.pages]
            title = "pages" if name == "kv" else ""
            lines.append(_line(title, f"{name:13} {sum(used) / len(used):6.1%} on average, {max(used):6.1%} at most"))
    lines.append(_line("adapter loads", f"{counters['loads']:.0f}"))
    return lines


def _line(title: str, text: str) -> str:
    return f"{title:15}{text}"

"""What ``slora-jax simulate`` and ``slora-jax bench`` have in common: checks, traces, tables."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
import sys
from typing import Any

from slora_jax.errors import RequestError, SloraError
from slora_jax.policies import make_policy
from slora_jax.traces import (
    SETTINGS,
    Setting,
    TraceRequest,
    burst,
    chat_trace,
    parse_trace,
    synthetic_trace,
    with_prefix,
)

_SECONDS = 120.0


def check_options(args: argparse.Namespace) -> None:
    """Raises SloraError for what is wrong whatever the workload."""
    make_policy(args.policy, dict(args.policy_option))
    for name in ("max_seqs", "max_step_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise SloraError(f"{name} must be at least 1, not {value}")
    if args.prompt_gap < 0:
        raise SloraError(f"prompt_gap must not be negative, not {args.prompt_gap}")
    if args.slo <= 0:
        raise SloraError(f"slo must be positive, not {args.slo}")
    if args.prefix < 0:
        raise SloraError(f"prefix must not be negative, not {args.prefix}")


def check_limits(max_seqs: int, max_step_tokens: int) -> None:
    if max_step_tokens < max_seqs:
        raise SloraError(f"max_step_tokens {max_step_tokens} is less than max_seqs {max_seqs}")


def choose_setting(args: argparse.Namespace, default: Setting | None = None) -> Setting:
    setting = SETTINGS[args.setting] if args.setting else default or SETTINGS["S2"]
    return Setting(
        shape=args.shape or setting.shape,
        ranks=tuple(args.rank) if args.rank else setting.ranks,
        targets=tuple(args.target) if args.target else setting.targets,
    )


def read_trace(
    args: argparse.Namespace, *, adapters: int, rate: float, alpha: float = 1.0, cv: float = 1.0
) -> list[TraceRequest]:
    """The trace that the options name, with these of a sweep. Raises RequestError."""
    if args.trace is None:
        if args.seconds is not None and args.requests is not None:
            raise RequestError("give either --seconds or --requests")
        seconds = _SECONDS if args.seconds is None and args.requests is None else args.seconds
        common: dict[str, Any] = dict(adapters=adapters, rate=rate, seconds=seconds, requests=args.requests)
        common |= dict(alpha=alpha, cv=cv, seed=args.seed)
        trace = chat_trace(**common) if args.chat else synthetic_trace(**common, lengths=args.lengths)
    else:
        try:
            text = sys.stdin.read() if args.trace == "-" else Path(args.trace).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{args.trace} cannot be read: {error}") from None
        trace = parse_trace(text.splitlines())
    if args.prefix:
        trace = with_prefix(trace, args.prefix)
    return burst(trace) if args.burst else trace


def write_text(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise SloraError(f"{path} cannot be written: {error.strerror}") from None


def figures_table(figures: Mapping[str, Any], pages: Sequence[Mapping[str, float]]) -> list[str]:
    """Lines for people. figures: of summarise, with cost_model or floor_requests_per_second if known."""
    lines = [
        line(
            "requests",
            f"{figures['requests']}: {figures['finished']} finished, {figures['aborted']} given up, "
            f"{figures['preemptions']} preemptions",
        ),
        line("time", f"{figures['seconds']:.1f} s, {figures['counters']['steps']:.0f} steps{_model(figures)}"),
        line(
            "throughput",
            f"{figures['requests_per_second']:.2f} requests/s{_steady(figures)}, "
            f"{figures['output_tokens_per_second']:.0f} output tokens/s, "
            f"{figures['tokens_per_second']:.0f} with prompts",
        ),
    ]
    if floor := figures.get("floor_requests_per_second"):
        share = figures["requests_per_second"] / floor
        lines.append(line("floor", f"{floor:.2f} requests/s by bytes and operations; this is {share:.2f} of it"))
    lines.append(line("", f"{'mean':>9} {'p50':>9} {'p90':>9} {'p99':>9}"))
    for name, title, unit in (
        ("ttft", "first token", 1),
        ("tpot", "later tokens", 1000),
        ("latency", "whole answer", 1),
    ):
        if spread := figures[name]:
            numbers = " ".join(f"{spread[key] * unit:9.3f}" for key in ("mean", "p50", "p90", "p99"))
            lines.append(line(title, f"{numbers} {'ms' if unit == 1000 else 's'}"))
    lines.append(
        line("objective", f"attainment {figures['slo_attainment']:.3f}, satisfaction {figures['satisfaction']:.3f}")
    )
    if figures["adapter_fairness"] is not None:
        lines.append(line("fairness", f"{figures['adapter_fairness']:.3f} (Jain's index over adapters)"))
    if pages:
        total = sum(value for name, value in pages[0].items() if name != "seconds")
        for name in ("kv", "idle_kv", "adapter", "idle_adapter", "free"):
            used = [row[name] / total for row in pages]
            title = "pages" if name == "kv" else ""
            lines.append(line(title, f"{name:13} {sum(used) / len(used):6.1%} on average, {max(used):6.1%} at most"))
    lines.append(line("adapter loads", f"{figures['counters']['loads']:.0f}"))
    return lines


def _model(figures: Mapping[str, Any]) -> str:
    return f", cost model {figures['cost_model']!r}" if "cost_model" in figures else ""


def _steady(figures: Mapping[str, Any]) -> str:
    rate = figures["steady_requests_per_second"]
    return f" ({rate:.2f} in steady state)" if rate else ""  # none in a run of less than 20 seconds


def line(title: str, text: str) -> str:
    return f"{title:14} {text}"

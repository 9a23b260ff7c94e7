"""``slora-jax simulate``: what a workload would do, predicted without a GPU."""

import argparse
import dataclasses
import json

from slora_jax.cli.workload import (
    check_limits,
    check_options,
    choose_setting,
    figures_table,
    line,
    read_trace,
    write_text,
)
from slora_jax.errors import SloraError
from slora_jax.shapes import named_shape
from slora_jax.traces import Setting
from slora_jax.twin import Calibration, CostModel, Simulation, calibrate, ideal_cost, simulate, summarise

_DEFAULTS = dict(page_pool_bytes=100 << 30, max_seqs=256, max_step_tokens=2048)


def run(args: argparse.Namespace) -> int:
    check_options(args)
    simulation, calibration = _simulation(args)
    check_limits(simulation.max_seqs, simulation.max_step_tokens)
    trace = read_trace(args, adapters=args.adapters, rate=args.rate, alpha=args.alpha, cv=args.cv)
    result = simulate(simulation, trace)
    figures = summarise(result.records, args.slo) | dict(cost_model=simulation.cost.name, counters=result.counters)
    if args.cost or calibration:
        floor = dataclasses.replace(simulation, cost=ideal_cost(simulation.config), buckets=None, overlap=False)
        figures["floor_requests_per_second"] = summarise(simulate(floor, trace).records)["requests_per_second"]
    if calibration:
        figures["calibration"] = dict(cost=dataclasses.asdict(calibration.cost), step_error=calibration.error)
    if args.json:
        text = json.dumps(figures | dict(pages=result.pages), indent=2)
        if args.json == "-":
            print(text)
            return 0
        write_text(args.json, text)
    print("\n".join(figures_table(figures, result.pages)))
    if calibration:
        print(line("calibration", f"steps are off by {calibration.error:.1%} of the mean step"))
    return 0


def _simulation(args: argparse.Namespace) -> tuple[Simulation, Calibration | None]:
    if args.cost and args.calibrate:
        raise SloraError("give either --cost or --calibrate")
    measured = calibrate(args.calibrate) if args.calibrate else None
    setting = choose_setting(args, Setting(**_lists_to_tuples(measured.setting)) if measured else None)
    config = named_shape(setting.shape)
    engine = _DEFAULTS | (dict(measured.engine) if measured else {})
    given = dict(page_pool_bytes=args.page_pool, max_seqs=args.max_seqs, max_step_tokens=args.max_step_tokens)
    limits = {name: engine[name] if value is None else value for name, value in given.items()}
    cost = measured.cost if measured else CostModel.from_json(args.cost) if args.cost else ideal_cost(config)
    same = measured and all(limits[name] == engine[name] for name in ("max_seqs", "max_step_tokens"))
    simulation = Simulation(
        config=config,
        setting=setting,
        cost=cost,
        policy=args.policy,
        policy_options=dict(args.policy_option),
        prefix_caching=not args.no_prefix_caching,
        prompt_gap=args.prompt_gap,
        buckets=measured.buckets if measured and same else None,
        overlap=bool(measured or args.cost),
        item_bytes=engine.get("item_bytes", 2),
        **limits,
    )
    return simulation, measured


def _lists_to_tuples(fields):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

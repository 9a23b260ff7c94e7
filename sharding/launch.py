"""Starts one process of a program that runs on several, and ends it when another one dies.

    srun python -m sharding.launch -m slora_jax serve --model ... --tp 16
    python -m sharding.launch --coordinator host0:1234 --processes 2 --process 0 -m slora_jax serve --model ... --tp 8

The same command runs in every process. Under Slurm, Open MPI, Kubernetes' JobSet (all three detected by JAX) and
LeaderWorkerSet nothing need be said about who is who; elsewhere give the three options. Process 0 schedules, answers
and prints; the others run the same steps.
"""

import argparse
from collections.abc import Mapping
import os
import runpy
import sys
import traceback
from typing import Any

import jax

from sharding.processes import die, join

_PORT = 8476


def leader_worker_set(env: Mapping[str, str]) -> dict[str, Any] | None:
    """What LeaderWorkerSet tells its pods (kubernetes-sigs/lws), or None elsewhere."""
    names = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")
    if not all(env.get(name) for name in names):
        return None
    address, size, index = (env[name] for name in names)
    return dict(
        coordinator_address=f"{address}:{env.get('JAX_COORDINATOR_PORT', _PORT)}",
        num_processes=int(size),
        process_id=int(index),
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m sharding.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, with a port that is free there"
    )
    found.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    found.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    found.add_argument(
        "--local-devices",
        type=lambda text: [int(n) for n in text.split(",")],
        metavar="0,1,...",
        help="GPUs of this process; default: under Slurm and Open MPI the one of its local rank, else all",
    )
    found.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="how long to wait for the others")
    found.add_argument("-m", dest="module", metavar="MODULE", help="module to run, as python -m would")
    found.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the module, or a script and its arguments")
    return found


def connection(args: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of jax.distributed.initialize. Raises ValueError where only a part of the options is given."""
    given = (args.coordinator, args.processes, args.process)
    if all(value is None for value in given):
        where = leader_worker_set(env) or {}
    elif any(value is None for value in given):
        raise ValueError("give all of --coordinator, --processes and --process, or none")
    else:
        where = dict(coordinator_address=args.coordinator, num_processes=args.processes, process_id=args.process)
    if where:
        where["cluster_detection_method"] = "deactivate"
    if args.local_devices is not None:
        where["local_device_ids"] = args.local_devices
    return where | dict(initialization_timeout=args.timeout)


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if not args.module and not args.args:
        raise SystemExit("python -m sharding.launch: say what to run: -m MODULE, or a script")
    try:
        jax.distributed.initialize(**connection(args, os.environ))
    except (ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise SystemExit(f"python -m sharding.launch: {lines[0] if lines else error}") from None
    processes = join(args.timeout)
    try:
        if args.module:
            sys.argv = [args.module, *args.args]
            runpy.run_module(args.module, run_name="__main__", alter_sys=True)
        else:
            sys.argv = args.args
            runpy.run_path(args.args[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            die(f"process {processes.index} ends: {stop.code}")
    except BaseException:  # jax would wait for the others before the process ends, and they wait for it
        traceback.print_exc()
        die(f"process {processes.index} ends because of the error above")
    processes.close()


if __name__ == "__main__":
    main()

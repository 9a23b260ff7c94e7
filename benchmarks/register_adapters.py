"""Registers a directory of many adapters, of which no tensor is read: how long it takes, and how much memory.

    python -m benchmarks.register_adapters --adapters 100000 --shape llama-2-7b

The directories hold hard links to the files of one adapter, so that they take little disk; registering opens, checks
and stamps each of them all the same. Needs no GPU and loads no model.
"""

import argparse
import gc
import os
from pathlib import Path
import tempfile
import time
import tracemalloc

from benchmarks.record import RESULTS, write_result
from slora_jax.adapters import AdapterReader, random_adapter, save_adapter
from slora_jax.registry import AdapterRegistry
from slora_jax.shapes import named_shape

_LINKS = 50_000  # to one file; ext4 allows 65,000


def make_directories(root: Path, count: int, shape: str, rank: int, targets: list[str]) -> None:
    """`count` directories with the files of one adapter."""
    adapter = random_adapter(named_shape(shape), rank, targets)
    for i in range(count):
        path = root / f"adapter-{i}"
        if i % _LINKS == 0:
            first = save_adapter(adapter, path)
            files = [entry.name for entry in os.scandir(first)]
            continue
        path.mkdir()
        for name in files:
            os.link(first / name, path / name)


def register(root: Path, shape: str) -> tuple[AdapterRegistry, float, float]:
    """What Engine.add_adapter_directory does on the host. Returns the registry, the seconds and the CPU's seconds."""
    began, busy = time.perf_counter(), time.process_time()
    found, refused = AdapterReader(named_shape(shape)).check_all(root)
    registry = AdapterRegistry()
    for name, files in found.items():
        registry.add(name, files)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    assert not refused, next(iter(refused.values()))
    return registry, seconds, busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--shape", default="llama-2-7b", help="named shape of the base model")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q,k,v,o")
    parser.add_argument("--root", type=Path, help="where the directories are made; not given: a temporary directory")
    parser.add_argument("--json", type=Path, default=RESULTS / "register_adapters.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.root) as name:
        root = Path(name)
        began = time.perf_counter()
        make_directories(root, args.adapters, args.shape, args.rank, args.targets.split(","))
        made = time.perf_counter() - began
        _, seconds, busy = register(root, args.shape)
        tracemalloc.start()  # slows it down: a second time, only for the memory
        gc.collect()
        registry, _, _ = register(root, args.shape)
        gc.collect()
        memory, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        began = time.perf_counter()
        found = registry.get(f"adapter-{args.adapters - 1}")
        result = dict(
            adapters=len(registry),
            shape=args.shape,
            rank=args.rank,
            targets=args.targets,
            seconds_to_make_directories=made,
            seconds_to_register=seconds,
            cpu_seconds_to_register=busy,  # less where other programs run, or the disk is slow
            microseconds_an_adapter=seconds / args.adapters * 1e6,
            bytes_an_adapter=memory / args.adapters,
            peak_bytes=peak,
            microseconds_to_find_one=(time.perf_counter() - began) * 1e6,
            unread=found.digest is None,
            cores=os.cpu_count(),
        )
    write_result(args.json, result)
    for key, value in result.items():
        print(f"{key:28} {value}")


if __name__ == "__main__":
    main()

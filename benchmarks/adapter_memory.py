"""Whether the process grows while adapters come and go: they are read again and again, as the engine's loader does.

    python -m benchmarks.adapter_memory --reads 120 --json FILE

Four threads read adapters of a named shape from files and lay them out; images up to a budget of bytes are kept. After
every tenth read: what the process has in memory, and how much of that malloc's heaps have taken from the system
(mallinfo2 of glibc 2.33 or newer; large blocks, which malloc maps, are not among it).
"""

import argparse
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import ctypes
import os
from pathlib import Path
import random
import tempfile
import time
from typing import Any

from jax import numpy as jnp

from benchmarks.record import write_result
from slora_jax.adapters import AdapterReader, random_adapter, save_adapter
from slora_jax.placement import HostImage, HostImages
from slora_jax.shapes import named_shape

_THREADS, _CHUNK_PAGES = 4, 4


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _heap_bytes() -> int:
    """Bytes that malloc's heaps have taken from the system."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallInfo
    return mallinfo().arena


def _process_bytes() -> int:
    """Bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", help="named shape of the base model")
    parser.add_argument("--targets", default="q,k,v,o", help="projections that the adapters adapt")
    parser.add_argument("--ranks", default="8,16,32,64")
    parser.add_argument("--reads", type=int, default=120)
    parser.add_argument("--keep", type=int, default=200_000_000, help="bytes of images that are kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    config, ranks = named_shape(args.shape), [int(rank) for rank in args.ranks.split(",")]
    images, reader = HostImages(config, jnp.bfloat16, _CHUNK_PAGES), AdapterReader(config)
    heap_bytes: list[int] = []
    process_bytes: list[int] = []
    kept: deque[HostImage] = deque()
    pending: deque[Future[HostImage]] = deque()
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(_THREADS) as threads:
        for rank in ranks:
            adapter = random_adapter(config, rank, args.targets.split(","), seed=rank, dtype=jnp.bfloat16)
            save_adapter(adapter, Path(root) / str(rank))
        del adapter
        chosen, began = random.Random(0), time.perf_counter()
        for number in range(args.reads):
            path = Path(root) / str(chosen.choice(ranks))
            pending.append(threads.submit(lambda path=path: images.make(reader.read(path))))
            if len(pending) == _THREADS:
                kept.append(pending.popleft().result())
            while sum(image.nbytes for image in kept) > args.keep:
                kept.popleft()
            if number % 10 == 9:
                heap_bytes.append(_heap_bytes())
                process_bytes.append(_process_bytes())
        for future in pending:
            future.result()
        seconds = time.perf_counter() - began
    arguments = {name: value for name, value in vars(args).items() if name != "json"}
    result = dict(**arguments, seconds=seconds, heap_bytes=heap_bytes, process_bytes=process_bytes)
    print(f"{seconds:.1f} s")
    print(f"MB of heaps       {[n // 10**6 for n in heap_bytes]}")
    print(f"MB of the process {[n // 10**6 for n in process_bytes]}")
    if args.json:
        write_result(args.json, result)
    return result


if __name__ == "__main__":
    main()

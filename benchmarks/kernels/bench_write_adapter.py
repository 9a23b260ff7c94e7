"""write_adapter on one GPU: the Hopper kernel, XLA's scatter, and the floor.

    python -m benchmarks.kernels.bench_write_adapter --json out.json

Floor: bytes read and written / measured copy bandwidth. A pool of Llama-2-7B's or Llama-3.1-8B's shape takes pieces of
so many pages, each at other places, in one compiled step.
"""

import argparse
import json
from pathlib import Path

import jax
from jax import numpy as jnp
import numpy as np

from benchmarks.kernels.bench_attention import ceilings, seconds
from benchmarks.record import environment
from pallas_kernels import Implementation, write_adapter
from pallas_kernels.paged_attention.arg_specs import HEADS, geometry

LAYERS, PAGES, PIECES = 32, 512, 4


def bench(elements: int, num_pages: int) -> tuple[int, dict[str, float]]:
    """Bytes that a piece of `num_pages` pages moves, and seconds it takes."""
    ids = np.random.default_rng(0).permutation(PAGES)[: PIECES * num_pages].reshape(PIECES, num_pages)
    places = [jnp.asarray(part, jnp.int32) for part in ids]
    # an array each: XLA would copy a slice, or fuse it into a call in place (slora_jax/model.py, _ROWS)
    images = [jnp.full((num_pages, LAYERS, elements), i, jnp.bfloat16) for i in range(PIECES)]
    pages = jnp.zeros((LAYERS, PAGES, elements), jnp.bfloat16)

    def time(implementation: Implementation) -> float:
        def write(pages, places, images):
            for i in range(PIECES):
                pages = write_adapter(pages, places[i], images[i], implementation=implementation)
            return pages

        run = jax.jit(write, donate_argnums=0)

        def step():
            nonlocal pages
            pages = run(pages, places, images)
            return pages

        return seconds(step) / PIECES

    times = {"mosaic": time("mosaic"), "xla": time("xla")}
    return 2 * images[0].nbytes, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, nargs="*", default=[1, 8], help="of a piece")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    ceiling = ceilings()
    rows = []
    for name, heads in HEADS.items():
        for num_pages in args.pages:
            moved, times = bench(geometry(*heads, LAYERS).page_elements, num_pages)
            floor = moved / ceiling["copy"]
            us = {kind: value * 1e6 for kind, value in times.items()}
            rows.append(dict(shape=name, pages=num_pages, bytes=moved, floor_us=floor * 1e6, us=us))
            listed = "  ".join(f"{kind} {value:.1f}" for kind, value in us.items())
            print(f"{name:4} {num_pages:3d} pages  floor {floor * 1e6:6.1f} us  us: {listed}", flush=True)
            if args.json:
                found = dict(environment=environment(), ceilings=ceiling, results=rows)
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

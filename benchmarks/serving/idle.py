"""How long the GPU has nothing to do between kernels, from a profile of a running engine."""

from collections.abc import Iterable, Iterator
from pathlib import Path
import tempfile
import threading
from typing import Any

import jax
import numpy as np

_GAP = 5e-6  # seconds: a launch behind another; what is longer has a reason


def idle_figures(kernels: Iterable[tuple[float, float]]) -> dict[str, Any] | None:
    """kernels: (begin, end) in nanoseconds, of one device, in any order; they may overlap. None if there are none.

    idle: share of the time from the first begin to the last end in which none ran.
    """
    found = sorted(kernels)
    if not found:
        return None
    origin = found[0][0]  # such moments have more digits than a double
    times = np.array([(begin - origin, end - origin) for begin, end in found], float) * 1e-9
    busy_until = np.maximum.accumulate(times[:, 1])
    gaps = np.maximum(times[1:, 0] - busy_until[:-1], 0.0)
    span = float(busy_until[-1] - times[0, 0])
    long = gaps[gaps > _GAP]
    return dict(
        seconds=span,
        kernels=len(times),
        idle=float(gaps.sum()) / span if span else 0.0,
        gaps=len(long),
        idle_in_gaps=float(long.sum()) / span if span else 0.0,
        longest_gaps_us=[round(float(g) * 1e6, 1) for g in np.sort(long)[:-9:-1]],
    )


def kernel_spans(folder: Path) -> Iterator[tuple[float, float]]:
    """(begin, end) in nanoseconds of all that ran on the first GPU in a profile, but copies from and to the host."""
    for file in sorted(folder.rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if plane.name != "/device:GPU:0":
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    if not event.name.startswith(("MemcpyH2D", "MemcpyD2H")):
                        yield event.start_ns, event.start_ns + event.duration_ns


class Profile:
    """Profiles a running engine for so many seconds, `after` so many others, on a thread of its own, while it is open.

    figures: afterwards, what idle_figures tells; None where no GPU was traced or nothing was going on any more.
    """

    def __init__(self, after: float, seconds: float):
        self.figures: dict[str, Any] | None = None
        self._after, self._seconds = after, seconds
        self._stop = threading.Event()
        self._folder = tempfile.TemporaryDirectory()
        self._thread = threading.Thread(target=self._trace, name="profile")

    def _trace(self) -> None:
        if self._stop.wait(self._after):
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = options.host_tracer_level = 0  # they would hold up the engine's thread
        jax.profiler.start_trace(self._folder.name, profiler_options=options)
        self._stop.wait(self._seconds)
        jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        self._thread.join()
        with self._folder as folder:
            self.figures = idle_figures(kernel_spans(Path(folder)))

"""Results of a benchmark in parts, which goes on where it ended when it is started again."""

import dataclasses
import json
from pathlib import Path
import time
from typing import Any

from benchmarks.record import write_result


class OutOfTime(Exception):
    """The budget is spent."""


@dataclasses.dataclass
class Report:
    """Results by the name of their part, in a file that is always up to date. Parts found there are not run again, but
    for those that failed.
    """

    path: Path
    settings: dict[str, Any]
    deadline: float

    def __post_init__(self):
        self.parts: dict[str, Any] = {}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if {k: found.get(k) for k in self.settings} != self.settings:
                raise SystemExit(f"{self.path} holds results of other settings; give another --json")
            self.parts = {name: part for name, part in found["parts"].items() if "error" not in part}

    def missing(self, name: str) -> bool:
        return name not in self.parts

    def run(self, name: str, part, least: float) -> None:
        """Runs a part that takes `least` seconds or more. What it raises is recorded, unless the time is up."""
        if not self.missing(name):
            return
        self.check(least)
        start = time.monotonic()
        try:
            result = part()
        except OutOfTime:
            raise
        except Exception as error:  # noqa: BLE001 - one layout that does not fit must not end the others
            result = dict(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
        self.parts[name] = dict(result, part_seconds=round(time.monotonic() - start, 2))
        write_result(self.path, dict(self.settings, parts=self.parts))
        shown = {k: v for k, v in self.parts[name].items() if k not in ("collectives", "profile", "step_seconds")}
        print(f"{name}: {json.dumps(shown)[:500]}", flush=True)

    def check(self, least: float) -> None:
        if time.monotonic() + least > self.deadline:
            raise OutOfTime

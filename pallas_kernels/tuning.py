"""The table of measured kernel configs: for each kind of device, op and shape the settings that were fastest there.

Scripts in benchmarks/kernels fill it with ``--tune``; a kernel whose shape it lacks uses its own default.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax

TABLE = pathlib.Path(__file__).with_name("tuning.json")


def _read() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def _device_kind() -> str:
    return jax.devices()[0].device_kind


@functools.cache
def measured(op: str, shape: str) -> dict[str, Any] | None:
    """Settings of `op` for a shape on the default device, or None if nobody has measured them."""
    return _read().get(_device_kind(), {}).get(op, {}).get(shape)


def keep(op: str, shape: str, config: Any) -> None:
    """Writes a config, a dataclass, into the table for the default device."""
    table = _read()
    table.setdefault(_device_kind(), {}).setdefault(op, {})[shape] = dataclasses.asdict(config)
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    measured.cache_clear()

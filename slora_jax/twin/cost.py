"""How long a step takes: a linear model of what it has to do, from a measurement or from counting bytes and FLOPs."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from slora_jax.buckets import Buckets
from slora_jax.errors import SloraError
from slora_jax.model_config import ModelConfig, param_specs
from slora_jax.sequence import Chunk

ITEM_BYTES = 2  # bfloat16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a step has to do.

    decode_tokens, prompt_tokens: tokens computed. decode_context: tokens of keys and values that the decode tokens
    read, together. prompt_context: pairs of a prompt token and a token it attends to. adapter_bytes: weights of the
    distinct adapters in the step. load_bytes: weights copied from the host before it. sequences: that take part.
    padded_tokens: tokens that the compiled program computes, padding included; 0: as many as there are.
    """

    decode_tokens: int = 0
    prompt_tokens: int = 0
    decode_context: int = 0
    prompt_context: int = 0
    adapter_bytes: int = 0
    load_bytes: int = 0
    sequences: int = 0
    padded_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.padded_tokens or self.decode_tokens + self.prompt_tokens


def step_work(
    chunks: Iterable[Chunk],
    adapter_bytes: Callable[[str], int],
    load_bytes: int = 0,
    buckets: Buckets | None = None,
) -> StepWork:
    """What a planned step has to do. adapter_bytes: of an adapter by its digest. buckets: to which steps are padded."""
    chunks = list(chunks)
    decode = [c for c in chunks if c.length == 1]
    prompt = [c for c in chunks if c.length > 1]
    tokens = sum(c.length for c in chunks)
    return StepWork(
        decode_tokens=len(decode),
        prompt_tokens=sum(c.length for c in prompt),
        decode_context=sum(c.start + 1 for c in decode),
        prompt_context=sum(c.length * c.start + c.length * (c.length + 1) // 2 for c in prompt),
        adapter_bytes=sum(map(adapter_bytes, {c.seq.adapter.digest for c in chunks if c.seq.adapter})),
        load_bytes=load_bytes,
        sequences=len(chunks),
        padded_tokens=buckets.shape(len(chunks), tokens, not prompt)[1] if buckets else 0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds of a step: ``step + max(weights, token * tokens)`` for the base model's projections, plus each other
    coefficient times its part of the work.

    step: that every step takes. prompt_step: that one with prompt tokens takes besides. weights: to read the weights.
    token: for one token's projections. prompt_token: what one takes besides in a step with prompt tokens. sequence,
    decode_context, prompt_context, adapter_byte, load_byte: for one unit of StepWork's field. overlap: copies from the
    host run beside the step, so that only the longer of the two counts.
    """

    name: str
    step: float = 0.0
    prompt_step: float = 0.0
    weights: float = 0.0
    token: float = 0.0
    prompt_token: float = 0.0
    sequence: float = 0.0
    decode_context: float = 0.0
    prompt_context: float = 0.0
    adapter_byte: float = 0.0
    load_byte: float = 0.0
    overlap: bool = False

    def seconds(self, work: StepWork) -> float:
        compute = (
            self.step
            + (self.prompt_step + self.prompt_token * work.tokens if work.prompt_tokens else 0.0)
            + max(self.weights, self.token * work.tokens)
            + self.sequence * work.sequences
            + self.decode_context * work.decode_context
            + self.prompt_context * work.prompt_context
            + self.adapter_byte * work.adapter_bytes
        )
        load = self.load_byte * work.load_bytes
        return max(compute, load) if self.overlap else compute + load

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, path: str | Path) -> "CostModel":
        """Reads what to_json wrote. Raises SloraError naming what is wrong with the file."""
        try:
            fields = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise SloraError(f"cost model {path} cannot be read: {error}") from None
        known = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not fields.keys() <= known.keys() or "name" not in fields:
            raise SloraError(f"cost model {path} must be an object with a name and any of {', '.join(known)}")
        for name, value in fields.items():
            if name not in ("name", "overlap") and not _is_time(value):
                raise SloraError(f"cost model {path}: {name} must be a number of seconds, not {value!r}")
        return cls(**_typed(fields))


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _typed(fields: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"name": str, "overlap": bool}
    return {name: kinds.get(name, float)(value) for name, value in fields.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device can do at best. Defaults: measured on one H200."""

    bytes_per_second: float = 4.3e12
    operations_per_second: float = 790e12
    host_bytes_per_second: float = 43e9


def ideal_cost(config: ModelConfig, ceilings: Ceilings | None = None, item_bytes: int = ITEM_BYTES) -> CostModel:
    """The floor: bytes and operations at the device's ceilings, one after another, loads beside them, and nothing else.
    Real steps take longer. The operations of adapters and of the logits are not counted.

    ceilings: None takes those of an H200 in bfloat16. item_bytes: of a weight, and of an element of keys and values.
    """
    top = ceilings or Ceilings()
    sizes = {name: math.prod(spec.shape) for name, spec in param_specs(config).items()}
    read = sum(sizes.values()) - (0 if config.tied_embeddings else sizes["embed"])
    multiplied = sum(n for name, n in sizes.items() if name in ("wqkv", "wo", "wgu", "wdown"))
    layers = config.num_layers
    return CostModel(
        name="ideal",
        weights=read * item_bytes / top.bytes_per_second,
        token=2 * multiplied / top.operations_per_second,
        decode_context=2 * layers * config.kv_size * item_bytes / top.bytes_per_second,
        prompt_context=4 * layers * config.q_size / top.operations_per_second,
        adapter_byte=1 / top.bytes_per_second,
        load_byte=1 / top.host_bytes_per_second,
        overlap=True,
    )

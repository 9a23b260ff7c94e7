"""What PEFT answered: tests/data/golden.json, made by PEFT 0.21.2 in float32 with SmolLM2's GGUF weights rounded to
bfloat16.

A row has a prompt, 32 greedy tokens (past the end token), the gap between the two best logits at each, and the eight
best logits of the first.
"""

import json
from pathlib import Path

from slora_jax import Engine, EngineConfig, Request, SamplingParams

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests" / "data" / "golden.json").read_text())
ADAPTERS = {name: ROOT / "examples" / "adapters" / name for name in GOLDEN["adapters"]}
ROWS = [(None, row) for row in GOLDEN["base"]]
ROWS += [(name, row) for name, entry in GOLDEN["adapters"].items() for row in entry["prompts"]]


def make_engine(model, dtype: str = "float32", **kw) -> Engine:
    """An engine with every adapter of examples/adapters."""
    options = dict(max_seqs=64, max_step_tokens=256, max_model_len=512, compile_cache_dir="") | kw
    return Engine.from_pretrained(str(model), EngineConfig(dtype=dtype, weight_dtype="bfloat16", **options), ADAPTERS)


def requests() -> list[Request]:
    """Every row of the reference, to be answered past the end token."""
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    return [Request(None, name, params, row["prompt_token_ids"]) for name, row in ROWS]

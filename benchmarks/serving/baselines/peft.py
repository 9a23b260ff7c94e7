"""Hugging Face transformers and PEFT without a server, as S-LoRA's paper measured it: requests wait in one queue, a
batch takes the waiting requests of the oldest one's adapter, up to 50, is padded to its longest prompt and generates
until its longest answer is done. bfloat16 and SDPA on a GPU. An adapter is made on the device when it is first wanted,
while the clock stands still, so that loading costs nothing, which is more than S-LoRA's own baseline had. Stopped after
90 s; throughput is of what was finished by then.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import time
from typing import Any

from benchmarks.serving.session import floor_figures
from benchmarks.serving.workloads.sweep import points
from slora_jax import ModelConfig, SloraError
from slora_jax.progress import progress_bar
from slora_jax.shapes import named_shape
from slora_jax.traces import Setting, TraceRequest, prompt_tokens
from slora_jax.twin import Record, summarise

_BATCH = 50  # S-LoRA's for 7B
_LIMIT = 90.0  # seconds a point
_MODULES = dict(q="q_proj", k="k_proj", v="v_proj", o="o_proj", gate="gate_proj", up="up_proj", down="down_proj")


def measure(args: argparse.Namespace, setting: Setting) -> Iterator[dict[str, Any]]:
    torch = _require("torch")
    for name in ("peft", "transformers"):
        _require(name)
    named = list(points(args))
    count = max((r.adapter + 1 for _, trace in named for r in trace if r.adapter is not None), default=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _model(torch, named_shape(setting.shape), setting, bool(count), device)
    with torch.no_grad():  # not inference_mode, whose tensors could not be trained, which PEFT insists on
        warm_up = [TraceRequest(0.0, 0 if count else None, 4, 2)]
        _serve(torch, model, setting, warm_up, [[3, 4, 5, 6]], False, "warm-up")
        for what, trace in named:
            prompts = prompt_tokens(trace, named_shape(setting.shape).vocab_size, args.seed)
            title = ", ".join(f"{k} {v}" for k, v in what.items())
            records, steps = _serve(torch, model, setting, trace, prompts, not args.quiet, title)
            figures = summarise(records, args.slo)
            limits = dict(max_seqs=256, max_step_tokens=2048, page_pool_bytes=args.page_pool or 100 << 30)
            floor = floor_figures(args, setting, trace, **limits)
            yield dict(
                what,
                figures=figures,
                counters=dict(
                    steps=steps, loads=0, preemptions=0, prefix_hit_rate=0.0, adapter_hit_rate=1.0, compiles=0
                ),
                most_running=_BATCH,
                step_times=_NO_STEPS,
                floor=floor,
                of_floor=figures["requests_per_second"] / floor["requests_per_second"],
                pages=[],
                page_map=[],
            )


_NO_STEPS = {kind: dict(steps=0, seconds=0.0) for kind in ("decode", "prompt", "loading")} | dict(idle_seconds=0.0)


def _require(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise SloraError(f"{name} is not installed; system peft needs: pip install torch transformers peft") from None


@contextlib.contextmanager
def _made_on(torch: Any, device: str) -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def _lora(setting: Setting, index: int) -> Any:
    import peft

    rank = setting.ranks[index % len(setting.ranks)]
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[_MODULES[t] for t in setting.targets])


def _model(torch: Any, config: ModelConfig, setting: Setting, adapted: bool, device: str) -> Any:
    """A Llama with random weights, and with adapter 0 if there are to be adapters, ready to generate."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with _made_on(torch, device):
        model = LlamaForCausalLM(shape).eval()
        if adapted:
            model = peft.get_peft_model(model, _lora(setting, 0), adapter_name="adapter-0")
    return _ready(model)


def _ready(model: Any) -> Any:
    """With adapters in the base model's dtype, which PEFT makes in float32."""
    dtype = next(model.parameters()).dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _add_missing(torch: Any, model: Any, setting: Setting, adapter: int | None) -> float:
    """Makes an adapter that is not there yet. Returns the seconds that it took."""
    began = time.monotonic()
    if adapter is not None and f"adapter-{adapter}" not in model.peft_config:
        with _made_on(torch, model.device.type):
            model.add_adapter(f"adapter-{adapter}", _lora(setting, adapter))
        _ready(model)
    return time.monotonic() - began


@dataclasses.dataclass
class _Clock:
    """Notes when the first token of a batch is there; transformers asks it after every token."""

    first: float | None = None
    steps: int = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.steps += 1
        if self.first is None:
            input_ids[0, -1].item()  # waits for the device
            self.first = time.monotonic()
        return input_ids.new_zeros(input_ids.shape[0], dtype=bool)


def _serve(
    torch: Any,
    model: Any,
    setting: Setting,
    trace: Sequence[TraceRequest],
    prompts: Sequence[Sequence[int]],
    progress: bool,
    title: str,
) -> tuple[list[Record], int]:
    """Runs the trace in real time. Returns its records, unfinished ones without an end, and steps taken."""
    records = [Record(r) for r in trace]
    waiting = list(range(len(trace)))
    steps = finished = 0
    start = time.monotonic()
    with progress_bar(title, progress) as report:
        while waiting and (now := time.monotonic() - start) < _LIMIT:
            arrived = [i for i in waiting if trace[i].arrival <= now]
            if not arrived:
                time.sleep(min(trace[waiting[0]].arrival - now, 0.01))
                continue
            adapter = trace[arrived[0]].adapter
            batch = [i for i in arrived if trace[i].adapter == adapter][:_BATCH]
            start += _add_missing(torch, model, setting, adapter)
            steps += _generate(torch, model, batch, trace, prompts, records, start)
            waiting = [i for i in waiting if i not in set(batch)]
            finished += len(batch)
            report(finished, len(trace), "requests")
    return records, steps


def _generate(torch: Any, model: Any, batch: list[int], trace: Any, prompts: Any, records: Any, start: float) -> int:
    """One static batch. Returns its steps."""
    from transformers import StoppingCriteriaList

    adapter = trace[batch[0]].adapter
    for i in batch:
        records[i].scheduled = time.monotonic() - start
    width = max(len(prompts[i]) for i in batch)
    ids = torch.tensor([[0] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=model.device)
    longest = max(trace[i].output_len for i in batch)
    clock = _Clock()
    if adapter is not None:
        model.set_adapter(f"adapter-{adapter}")
    elif hasattr(model, "disable_adapter_layers"):
        model.disable_adapter_layers()
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        min_new_tokens=longest,
        max_new_tokens=longest,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    if adapter is None and hasattr(model, "enable_adapter_layers"):
        model.enable_adapter_layers()
    now = time.monotonic() - start
    for i in batch:
        records[i].first_token = None if clock.first is None else clock.first - start
        records[i].finished = now
    return clock.steps

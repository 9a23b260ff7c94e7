"""``slora-jax inspect``: what a model or an adapter is, what it takes, and whether it would be accepted."""

import argparse
import math
from pathlib import Path

import numpy as np

from pallas_kernels.geometry import MODULES, PAGE_TOKENS, ceil_div
from slora_jax.adapters import AdapterLimits, read_adapter
from slora_jax.adapters.image import layer_tiles
from slora_jax.adapters.peft_config import PeftLoraConfig, decode_config, parse_config
from slora_jax.adapters.safetensors_file import read_header
from slora_jax.adapters.source import CONFIG_FILE, WEIGHTS_FILE, locate, read_config_file
from slora_jax.errors import AdapterError, SloraError
from slora_jax.loading import load_config
from slora_jax.loading.source import find_source
from slora_jax.memory import page_bytes, weight_bytes
from slora_jax.model_config import ModelConfig, param_specs

_POOL = 1 << 30


def run(args: argparse.Namespace) -> int:
    try:
        if args.base is not None or _is_adapter(args.source):
            verdict = _inspect_adapter(args.source, args.base)
        else:
            verdict = _inspect_model(args.source)
    except SloraError as error:
        _line("accepted", f"no: {' '.join(str(error).split())}")
        return 1
    _line("accepted", verdict)
    return 0


def _line(title: str, text: str) -> None:
    print(f"{title:14}{text}")


def _is_adapter(source: str) -> bool:
    path = Path(source).expanduser()
    return (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file()


def _inspect_model(source: str) -> str:
    _line("model", f"{source} ({_KINDS[find_source(source).kind]})")
    config = load_config(source)
    _print_config(config)
    for dtype in ("bfloat16", "float32"):
        size = page_bytes(config, dtype)
        _line(
            dtype,
            f"{_size(weight_bytes(config, dtype))} of weights; a page of {PAGE_TOKENS} tokens takes {_size(size)}, "
            f"so 1 GiB of page pool holds {_POOL // size} pages, {_POOL // size * PAGE_TOKENS} tokens",
        )
    examples = [(rank, modules) for modules in (("q", "v"), MODULES) for rank in (8, 16, 64)]
    counts = [_pages_of_rank(config, rank, modules) for rank, modules in examples]
    _line("adapters", f"rank 8, 16, 64 on q and v: {counts[0]}, {counts[1]}, {counts[2]} pages")
    _line("", f"rank 8, 16, 64 on all seven projections: {counts[3]}, {counts[4]}, {counts[5]} pages")
    load_config(source, check_weights=True)
    checked = "its configuration" if find_source(source).kind == "hub" else "its configuration, tensor names and shapes"
    return f"yes, by {checked}"


_KINDS = {
    "hf": "Hugging Face directory",
    "hub": "Hugging Face id",
    "gguf": "GGUF file",
    "orbax": "converted by slora-jax",
    "random": "random weights",
}


def _print_config(config: ModelConfig) -> None:
    extras = [
        text
        for text, on in (
            ("tied embeddings", config.tied_embeddings),
            ("q, k, v bias", config.qkv_bias),
            ("q and k norm", config.qk_norm),
        )
        if on
    ]
    _line(
        "architecture",
        f"{config.architecture}: {config.num_layers} layers, hidden size {config.hidden_size}, MLP {config.mlp_size}, "
        f"{config.num_heads} heads and {config.num_kv_heads} KV heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size}" + "".join(f", {text}" for text in extras),
    )
    scaling = f", {config.rope_scaling.kind} scaling {config.rope_scaling.factor:g}" if config.rope_scaling else ""
    _line("context", f"{config.max_position} tokens, rope theta {config.rope_theta:g}{scaling}")
    _line("parameters", f"{sum(math.prod(spec.shape) for spec in param_specs(config).values()) / 1e6:.1f} million")


def _pages_of_rank(config: ModelConfig, rank: int, modules: tuple[str, ...]) -> int:
    geometry = config.geometry
    granules = np.broadcast_to(np.isin(MODULES, modules) * (rank // 8), (config.num_layers, len(MODULES)))
    return ceil_div(int(layer_tiles(granules, geometry).sum()), geometry.tiles_per_page_id)


def _inspect_adapter(source: str, base: str | None) -> str:
    _line("adapter", source)
    limits = AdapterLimits()
    try:
        path = locate(source, limits)
        peft = parse_config(decode_config(read_config_file(path, limits)), limits)
        _print_settings(peft)
        with open(path / WEIGHTS_FILE, "rb") as file:
            tensors = read_header(file, limits)
    except AdapterError as error:
        raise AdapterError(f"{source}: {error}") from None
    except OSError as error:
        raise AdapterError(f"{source}: cannot be read ({error.strerror or error})") from None
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    _line("tensors", f"{len(tensors)} of {', '.join(dtypes)}")
    if base is None:
        return "so far: its configuration is supported; add --base MODEL to check its tensors and count its pages"
    config = load_config(base)
    adapter = read_adapter(path, config)
    layers = int(adapter.ranks.any(axis=1).sum())
    scaling = np.unique(adapter.scaling[adapter.ranks > 0])
    _line("ranks", f"{adapter.rank_summary} on {' '.join(adapter.targets)}, in {layers} of {config.num_layers} layers")
    _line("scaling", ", ".join(f"{value:g}" for value in scaling[:8]) + (", …" if len(scaling) > 8 else ""))
    _line("digest", adapter.digest)
    pages, geometry = adapter.num_pages(config.geometry), config.geometry
    filled = 100 * adapter.num_tiles(geometry) / (pages * geometry.tiles_per_page_id)
    _line(
        "pages",
        f"{pages} ({_size(pages * page_bytes(config, 'bfloat16'))} of the pool in bfloat16), the space of "
        f"{pages * PAGE_TOKENS} tokens of KV cache; {filled:.0f} % filled",
    )
    _line("host memory", _size(adapter.nbytes))
    return f"yes, for {base}"


def _print_settings(peft: PeftLoraConfig) -> None:
    targets = peft.target_modules
    shown = targets if isinstance(targets, str) else "PEFT's default" if targets is None else " ".join(sorted(targets))
    kind = "rsLoRA" if peft.use_rslora else "LoRA"
    base = f", made for {peft.base_model}" if peft.base_model else ""
    _line("settings", f"{kind}, r {peft.r}, lora_alpha {peft.lora_alpha:g}, target_modules {shown}{base}")


def _size(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.4g} {unit}"
